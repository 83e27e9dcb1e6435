"""Distillation (Hinton et al., arXiv 1503.02531): learn from a teacher's answers besides the true targets.

From its probabilities; from its hidden states and attention too (TinyBERT, Jiao et al., arXiv 1909.10351); from the
teacher itself or from what it said when the data was prepared (`soft_targets`).
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor, nn

from launcher.errors import ModelError
from launcher.planning.plan import Plan
from launcher.recipe.task_sections import DistillationSection
from launcher.tasks.teacher import Teacher

PROJECTIONS = "distillation_projections"
"""Name of the student's module that holds them; no part of the model that is exported."""


class Distillation:
    """What a task adds to its loss while training.

    Args:
        plan: of the run; names the teacher.
        auto_class: of the task.
        labels: names of the classes, where targets are classes.
    """

    def __init__(self, plan: Plan, section: DistillationSection, auto_class: Any, labels: tuple[str, ...] = ()) -> None:
        self.section = section
        self._plan, self._auto_class, self._labels = plan, auto_class, labels
        self.teacher: Teacher | None = None

    @property
    def wanted(self) -> dict[str, bool]:
        """What the student must give besides its logits."""
        found = {"output_hidden_states": True} if self.section.hidden_weight else {}
        return found | ({"output_attentions": True} if self.section.attention_weight else {})

    def loss(
        self,
        loss_sum: Tensor,
        student: Any,
        inputs: dict[str, Any],
        counted: Tensor,
        weights: Tensor,
        known: dict[str, Tensor],
    ) -> Tensor:
        """The task's loss and the teacher's, by their weights.

        Args:
            loss_sum: of the true targets.
            student: what the model gave; `logits` [..., outputs] of the targets.
            inputs: of the model.
            counted: bool [...], which targets count.
            weights: [samples, length], by how much each position's hidden state counts; together as many as targets.
            known: what the teacher said when the data was prepared, by name; empty otherwise.
        """
        section, logits = self.section, student.logits
        if known:
            soft = known_loss(logits, known, counted, section.temperature)
            return (1 - section.weight) * loss_sum + section.weight * soft
        if self.teacher is None:
            size = self._plan.batch.micro_batch_size
            self.teacher = Teacher(section, self._auto_class, size, logits.shape[-1], self._labels)
        theirs = self.teacher.ask(logits.device, **inputs)
        soft = soft_loss(logits, theirs.logits.float(), counted, section.temperature)
        total = (1 - section.weight) * loss_sum + section.weight * soft
        if section.hidden_weight:
            own = getattr(student, PROJECTIONS, {})
            pairs = [
                (own.get(mine, student.hidden_states[mine]), theirs.hidden_states[other])
                for mine, other in layer_pairs(section, len(student.hidden_states) - 1, len(theirs.hidden_states) - 1)
            ]
            total = total + section.hidden_weight * hidden_loss(pairs, weights)
        if section.attention_weight:
            pairs = [
                (student.attentions[mine - 1], theirs.attentions[other - 1])
                for mine, other in layer_pairs(section, len(student.attentions), len(theirs.attentions))
            ]
            total = total + section.attention_weight * attention_loss(pairs, weights)
        return total


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


def known_loss(student: Tensor, known: dict[str, Tensor], counted: Tensor, temperature: float) -> Tensor:
    """The same from what the teacher said when the data was prepared: all logits, or the most probable tokens."""
    if "teacher_logits" in known:
        return soft_loss(student, known["teacher_logits"], counted, temperature)
    return top_loss(
        student, known["teacher_ids"], known["teacher_log_probs"], known["teacher_rest"], counted, temperature
    )


def top_loss(
    student: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor, counted: Tensor, temperature: float
) -> Tensor:
    """Kullback-Leibler divergence between distributions over the k tokens and "any other one", else as `soft_loss`.

    It is smaller than the whole divergence by the teacher's probability of the other tokens times the divergence of the
    two distributions among those (the chain rule of the divergence): never more than the whole, and the same for all
    tokens.

    Args:
        student: logits [..., tokens].
        ids: the teacher's k most probable tokens, int64 [..., k].
        log_probs: of them under the softened teacher, [..., k].
        rest: log-probability of all others together, [...].
        counted: bool [...], which targets count.
        temperature: logits are divided by it.
    """
    own = F.log_softmax(student.float() / temperature, dim=-1)
    each = (log_probs.exp() * (log_probs - own.gather(-1, ids))).sum(dim=-1)
    if ids.shape[-1] < student.shape[-1]:
        others = own.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
        each = each + rest.exp() * (rest - others)
    return torch.where(counted, each, 0.0).sum() * temperature**2


def layer_pairs(section: DistillationSection, student: int, teacher: int) -> list[tuple[int, int]]:
    """Which layer of the student's learns from which of the teacher's, both from 1.

    Args:
        section: says so, or not.
        student: its layers.
        teacher: its layers.

    Raises:
        ModelError: the section names layers that there are not.
    """
    if not section.layers:
        return [(layer, max(1, round(layer * teacher / student))) for layer in range(1, student + 1)]
    if len(section.layers) != student or not all(0 <= layer <= teacher for layer in section.layers):
        raise ModelError(
            f"distillation.layers: name one of the teacher's layers 1 to {teacher}, or 0, for each of the student's "
            f"{student}; it has {list(section.layers)}"
        )
    return [(mine, other) for mine, other in enumerate(section.layers, start=1) if other]


def hidden_loss(pairs: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Mean squared difference of hidden states, over their width and the layers; summed over positions by weight.

    Args:
        pairs: of a layer each, student's and teacher's, [samples, length, width].
        weights: of the positions, [samples, length].
    """
    each = torch.stack([(own.float() - other.float()).square().mean(dim=-1) for own, other in pairs]).mean(dim=0)
    return torch.where(weights > 0, each * weights, 0.0).sum()


def attention_loss(pairs: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Squared difference of attention, summed over what is attended to, mean over heads and layers; else as above.

    Args:
        pairs: of a layer each, student's and teacher's probabilities, [samples, heads, length, length].
        weights: of the positions that attend, [samples, length].
    """
    found = []
    for own, other in pairs:
        if own.shape[1] != other.shape[1]:
            own, other = own.mean(dim=1, keepdim=True), other.mean(dim=1, keepdim=True)
        found.append((own.float() - other.float()).square().sum(dim=-1).mean(dim=1))
    return torch.where(weights > 0, torch.stack(found).mean(dim=0) * weights, 0.0).sum()


def with_projections(model: Any, plan: Plan) -> Any:
    """Give a student the matrices that bring its hidden states to the teacher's width, where the widths differ.

    They are applied inside the model's forward pass, where ZeRO 3 gathers what a module needs, and trained with it.
    """
    section = plan.recipe.distillation
    if section is None or not section.hidden_weight:
        return model
    from transformers import AutoConfig

    teacher = AutoConfig.from_pretrained(section.teacher_name_or_path).get_text_config()
    own = model.config.get_text_config()
    if own.hidden_size == teacher.hidden_size:
        return model
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    matrices = nn.ModuleDict()
    for layer, _ in layer_pairs(section, own.num_hidden_layers, teacher.num_hidden_layers):
        matrix = nn.Linear(own.hidden_size, teacher.hidden_size, bias=False)
        nn.init.normal_(matrix.weight, std=own.hidden_size**-0.5, generator=generator)
        matrices[f"layer_{layer}"] = matrix
    model.add_module(PROJECTIONS, matrices)
    model.register_forward_hook(_project)
    return model


def _project(model: Any, inputs: Any, output: Any) -> None:
    if getattr(output, "hidden_states", None) is not None:
        matrices = getattr(model, PROJECTIONS)
        found = {int(name.removeprefix("layer_")): matrix for name, matrix in matrices.items()}
        projected = {layer: matrix(output.hidden_states[layer]) for layer, matrix in found.items()}
        setattr(output, PROJECTIONS, projected)
