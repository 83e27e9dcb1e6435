"""The teacher of a distillation: a pretrained model that is never trained, whole on each worker or spread over them."""

from typing import Any

import torch
from torch import Tensor

from launcher.errors import ModelError
from launcher.models.build import DTYPES
from launcher.models.streaming import streamed_weights
from launcher.recipe.task_sections import DistillationSection


class Teacher:
    """A pretrained model of the student's kind.

    With `zero_stage: 3` it is made by all ranks together, and they must ask it equally often.

    Args:
        section: names it.
        auto_class: of the task.
        micro_batch_size: samples of which it is asked at once.
        outputs: how many numbers the student gives for each target.
        labels: names of the classes, where targets are classes.

    Raises:
        ModelError: it cannot be loaded, or its outputs mean something else than the student's.
    """

    def __init__(
        self,
        section: DistillationSection,
        auto_class: Any,
        micro_batch_size: int,
        outputs: int,
        labels: tuple[str, ...] = (),
    ) -> None:
        self.section = section
        name = section.teacher_name_or_path
        attention = {"attn_implementation": "eager"} if section.attention_weight else {}
        try:
            if section.zero_stage == 3:
                self.model = _spread(section, auto_class, micro_batch_size, attention)
            else:
                self.model = auto_class.from_pretrained(name, dtype=DTYPES[section.dtype], **attention)
                self.model.requires_grad_(False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"distillation.teacher_name_or_path: transformers cannot load {name}: {error}") from error
        self.model.eval()
        _check_outputs(name, getattr(self.model, "module", self.model).config, outputs, labels)

    def ask(self, device: torch.device, **inputs: Any) -> Any:
        """What the teacher gives, without gradients, in its own number format."""
        if self.section.zero_stage == 0 and self.model.device != device:
            self.model.to(device)
        section = self.section
        more = {"output_hidden_states": True} if section.hidden_weight else {}
        more |= {"output_attentions": True} if section.attention_weight else {}
        dtype = DTYPES[section.dtype]
        inputs = {name: _in_format(values, dtype) for name, values in inputs.items()}
        with torch.no_grad():
            return self.model(**inputs, **more)

    def logits(self, device: torch.device, **inputs: Any) -> Tensor:
        """Its logits in fp32."""
        logits: Tensor = self.ask(device, **inputs).logits
        return logits.float()


def _in_format(values: Any, dtype: torch.dtype) -> Any:
    """Pixels in the teacher's number format; tokens as they are."""
    return values.to(dtype) if isinstance(values, Tensor) and values.is_floating_point() else values


def _spread(section: DistillationSection, auto_class: Any, micro_batch_size: int, attention: dict[str, str]) -> Any:
    """DeepSpeed's engine around a teacher that was partitioned while it was loaded."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": section.dtype == "bf16"},
        "fp16": {"enabled": section.dtype == "fp16"},
    }
    keep = HfDeepSpeedConfig(config)  # transformers looks at it while it loads, through a weak reference
    with streamed_weights():
        model = auto_class.from_pretrained(section.teacher_name_or_path, dtype=DTYPES[section.dtype], **attention)
    del keep
    engine, _, _, _ = deepspeed.initialize(model=model.eval().requires_grad_(False), config=config)
    return engine


def _check_outputs(name: str, config: Any, outputs: int, labels: tuple[str, ...]) -> None:
    theirs = config.num_labels if labels else config.get_text_config().vocab_size
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
