"""Distillation (Hinton et al., arXiv 1503.02531): learn from a teacher's probabilities besides the true targets."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor

from launcher.errors import ModelError
from launcher.recipe.task_sections import DistillationSection


class Teacher:
    """A pretrained model of the student's kind, whole on every rank, that is never trained.

    Args:
        section: names it.
        auto_class: of the task.
        outputs: how many numbers the student gives for each target.
        labels: names of the classes, where targets are classes.

    Raises:
        ModelError: it cannot be loaded, or its outputs mean something else than the student's.
    """

    def __init__(
        self, section: DistillationSection, auto_class: Any, outputs: int, labels: tuple[str, ...] = ()
    ) -> None:
        self.section = section
        name = section.teacher_name_or_path
        try:
            self.model = auto_class.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"distillation.teacher_name_or_path: transformers cannot load {name}: {error}") from error
        config = self.model.config
        theirs = config.num_labels if labels else config.vocab_size
        if theirs != outputs:
            kind = "classes" if labels else "tokens"
            raise ModelError(
                f"distillation.teacher_name_or_path: the teacher {name} has {theirs} {kind}, the student "
                f"{outputs}; they must be the same ones"
            )
        if labels and (names := tuple(config.id2label[number] for number in range(theirs))) != labels:
            raise ModelError(
                f"distillation.teacher_name_or_path: the teacher's classes are {', '.join(names)}, the student's "
                f"{', '.join(labels)}; give classification.labels in the teacher's order"
            )

    def logits(self, device: torch.device, **inputs: Any) -> Tensor:
        """What the teacher gives, in fp32, without gradients."""
        if self.model.device != device:
            self.model.to(device)
        with torch.no_grad():
            logits: Tensor = self.model(**inputs).logits
        return logits.float()


def soft_loss(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened distributions, summed over targets, times the temperature squared.

    Args:
        student: logits [..., outputs].
        teacher: logits of the same shape.
        counted: bool [...], which targets count.
        temperature: logits are divided by it.
    """
    own = F.log_softmax(student.float() / temperature, dim=-1)
    other = F.log_softmax(teacher / temperature, dim=-1)
    each = (other.exp() * (other - own)).sum(dim=-1)
    return torch.where(counted, each, 0.0).sum() * temperature**2


def distilled(loss_sum: Tensor, soft_sum: Tensor, section: DistillationSection) -> Tensor:
    """The two losses by their weights."""
    return (1 - section.weight) * loss_sum + section.weight * soft_sum
