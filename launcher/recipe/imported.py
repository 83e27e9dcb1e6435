"""What is carried over from another tool's file into a recipe, and what is named instead."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML

Convert = Callable[[Any], Any]


@dataclass
class Imported:
    """What another tool's file says, as a recipe.

    Attributes:
        tool: that the file is for.
        recipe: sections and fields; not complete where the file does not say what a recipe must.
        left_out: keys that could not be carried over, with the reason.
        open: fields that must be filled in before the recipe runs.
    """

    tool: str
    recipe: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set a field by its dotted path."""
        *sections, name = path.split(".")
        section = self.recipe
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value

    def yaml(self) -> str:
        """The recipe's text; what is missing, and what was left out, stands in comments above it."""
        lines = [f"# From {self.tool}."]
        lines += [f"# To be filled in: {name}" for name in self.open]
        lines += [f"# Not carried over: {key}: {reason}" for key, reason in self.left_out.items()]
        stream = io.StringIO()
        writer = YAML()
        writer.default_flow_style = False
        writer.dump(self.recipe, stream)
        return "\n".join(lines) + "\n" + stream.getvalue()


def positive(value: Any) -> Any:
    """A count, where the tool writes -1 or 0 for none."""
    return value if isinstance(value, int | float) and value > 0 else None


def _steps(value: Any) -> Any:
    """A number of steps; some tools take a share of all steps under the same name, which a recipe does not."""
    return int(value) if isinstance(value, int | float) and value >= 1 else None


def _length(value: Any) -> Any:
    return int(value) if positive(value) else None


def _kernels(value: Any) -> Any:
    """Liger's kernels: a recipe takes them on GPUs where they are installed."""
    return "auto" if value else None


def same(value: Any) -> Any:
    """The value as it is."""
    return value


TRAINING: dict[str, tuple[str, Convert]] = {
    "adam_beta1": ("optimizer.adam_beta1", same),
    "adam_beta2": ("optimizer.adam_beta2", same),
    "adam_epsilon": ("optimizer.adam_epsilon", float),
    "eval_steps": ("evaluation.eval_steps", _steps),
    "gradient_accumulation_steps": ("training.gradient_accumulation_steps", _steps),
    "gradient_checkpointing": ("training.gradient_checkpointing", bool),
    "greater_is_better": ("evaluation.greater_is_better", same),
    "learning_rate": ("training.learning_rate", float),
    "logging_steps": ("logging.logging_steps", _steps),
    "lr_scheduler_type": ("training.lr_scheduler_type", str),
    "max_grad_norm": ("training.max_grad_norm", float),
    "max_steps": ("training.max_steps", _length),
    "save_steps": ("checkpoint.save_steps", _steps),
    "save_total_limit": ("checkpoint.save_total_limit", _length),
    "seed": ("seed", int),
    "torch_compile": ("training.torch_compile", lambda value: True if value is True else None),
    "warmup_ratio": ("training.warmup_ratio", positive),
    "warmup_steps": ("training.warmup_steps", _steps),
    "weight_decay": ("optimizer.weight_decay", float),
}
"""Names that all three of the training tools share with transformers' `TrainingArguments`."""

TRAINING_ARGUMENTS: dict[str, tuple[str, Convert]] = {
    **TRAINING,
    "num_train_epochs": ("training.num_train_epochs", positive),
    "per_device_train_batch_size": ("training.micro_batch_size", int),
    "use_liger_kernel": ("model.kernels", _kernels),
}
AXOLOTL: dict[str, tuple[str, Convert]] = {
    **TRAINING,
    "base_model": ("model.model_name_or_path", str),
    "attn_implementation": ("model.attn_implementation", str),
    "lr_scheduler": ("training.lr_scheduler_type", str),
    "micro_batch_size": ("training.micro_batch_size", int),
    "num_epochs": ("training.num_train_epochs", positive),
    "sequence_len": ("data.sequence_length", int),
    "val_set_size": ("data.validation_fraction", lambda share: share if 0 < share < 1 else None),
    "lora_r": ("adapter.r", int),
    "lora_alpha": ("adapter.lora_alpha", float),
    "lora_dropout": ("adapter.lora_dropout", float),
    "lora_target_modules": ("adapter.target_modules", list),
    "lora_modules_to_save": ("adapter.modules_to_save", list),
    "tokenizer_config": ("tokenizer.tokenizer_name_or_path", str),
}
LLAMA_FACTORY: dict[str, tuple[str, Convert]] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": ("model.model_name_or_path", str),
    "cutoff_len": ("data.sequence_length", int),
    "preprocessing_num_workers": ("data.preprocessing_num_workers", int),
    "val_size": ("data.validation_fraction", lambda share: share if 0 < share < 1 else None),
    "lora_rank": ("adapter.r", int),
    "lora_alpha": ("adapter.lora_alpha", float),
    "lora_dropout": ("adapter.lora_dropout", float),
    "enable_liger_kernel": ("model.kernels", _kernels),
    "additional_target": ("adapter.modules_to_save", lambda text: [part.strip() for part in text.split(",")]),
}
DEEPSPEED: dict[str, tuple[str, Convert]] = {
    "gradient_accumulation_steps": ("training.gradient_accumulation_steps", int),
    "gradient_clipping": ("training.max_grad_norm", float),
    "train_batch_size": ("training.global_batch_size", int),
    "train_micro_batch_size_per_gpu": ("training.micro_batch_size", int),
}


def carry(found: Imported, content: dict[str, Any], table: Mapping[str, tuple[str, Convert]]) -> None:
    """Move what the table knows; `content` keeps the rest."""
    for key, (path, convert) in table.items():
        if key not in content:
            continue
        value = content.pop(key)
        try:
            made = None if value is None or value == "auto" else convert(value)
        except (TypeError, ValueError):
            found.left_out[key] = f"{value!r} is not understood"
            continue
        if made is not None:
            found.put(path, made)
        elif value not in (None, "auto", -1, 0, 0.0, ""):
            found.left_out[key] = f"{value!r} has no counterpart in {path}"


def put_precision(found: Imported, content: dict[str, Any]) -> None:
    """Carry over which 16-bit precision is switched on."""
    bf16, fp16 = content.pop("bf16", None), content.pop("fp16", None)
    found.put("training.precision", "bf16" if bf16 else "fp16" if fp16 else "fp32")


_SAME_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("lion", "lion_32bit", "lion_pytorch"), "lion"),
    **dict.fromkeys(("sgd", "adafactor", "muon"), None),
}
"""Names that mean one of a recipe's; `None`: the same name."""


def put_optimizer(found: Imported, content: dict[str, Any], key: str) -> None:
    """Carry over the optimizer's name; what there is none of here is named, with what is taken instead."""
    name = str(content.pop(key, None) or "adamw")
    if name in _SAME_OPTIMIZERS:
        kind = _SAME_OPTIMIZERS[name] or name
    else:
        kind = "lion" if "lion" in name else "adamw"
        found.left_out[key] = f"{name!r}: {kind} with states in fp32 is taken"
    if kind != "adamw":
        found.put("optimizer.type", kind)


def name_the_rest(found: Imported, content: dict[str, Any], reasons: Mapping[str, str]) -> None:
    """Name what was not carried over; what is switched off or empty needs no word."""
    for key, value in content.items():
        if value not in (None, False, "", [], {}, "no", "none"):
            found.left_out.setdefault(key, reasons.get(key, "a recipe has no such field"))
