"""What of DeepSpeed's config the recipe decides: the keys, their values, and the fields that they come from."""

from dataclasses import dataclass
from typing import Any

from launcher.planning.combinations import EXPERT_PRESETS, WHOLE_VOCABULARY
from launcher.planning.layout import BatchPlan, Layout
from launcher.planning.optimizers import OPTIMIZERS
from launcher.recipe.schema import Recipe


@dataclass(frozen=True)
class Owned:
    """One value that the recipe owns: where it stands in DeepSpeed's config, and its field in the recipe."""

    path: str
    value: Any
    field: str


def owned_keys(recipe: Recipe, layout: Layout, batch: BatchPlan, model_type: str | None) -> list[Owned]:
    """What the recipe decides, whatever the file says."""
    training, optimizer, zero = recipe.training, recipe.optimizer, recipe.zero
    kind = OPTIMIZERS[optimizer.type]
    owned = [
        Owned("train_micro_batch_size_per_gpu", batch.micro_batch_size, "training.micro_batch_size"),
        Owned("gradient_accumulation_steps", batch.gradient_accumulation_steps, "training.gradient_accumulation_steps"),
        Owned("gradient_clipping", training.max_grad_norm, "training.max_grad_norm"),
        Owned("bf16.enabled", training.precision == "bf16", "training.precision"),
        Owned("fp16.enabled", training.precision == "fp16", "training.precision"),
        Owned("optimizer.type", kind.deepspeed_type, "optimizer.type"),
        Owned("optimizer.params.lr", training.learning_rate, "training.learning_rate"),
        Owned("optimizer.params.weight_decay", optimizer.weight_decay, "optimizer.weight_decay"),
    ]
    for name, (value, field) in kind.params(optimizer).items():
        owned.append(Owned(f"optimizer.params.{name}", value, field))
    if optimizer.type != "adamw":
        # DeepSpeed's ZeRO otherwise accepts Adam and a few others only; our tests are what says that this one is right.
        owned.append(Owned("zero_allow_untested_optimizer", True, "optimizer.type"))
    if optimizer.type == "lion":
        # launcher.training.lion's; DeepSpeed otherwise takes its own compiled ones only, once states are offloaded.
        owned.append(Owned("zero_force_ds_cpu_optimizer", False, "optimizer.type"))
    if zero.stage is not None:
        owned.append(Owned("zero_optimization.stage", zero.stage, "zero.stage"))
    if layout.tensor_parallel_size > 1 and layout.pipeline_parallel_size == 1:
        # A pipeline's stages are spread by launcher/models/pipeline.py: AutoTP does not know their modules.
        field, sharded = "parallel.tensor_parallel_size", model_type not in WHOLE_VOCABULARY
        owned.append(Owned("tensor_parallel.autotp_size", layout.tensor_parallel_size, field))
        owned.append(Owned("tensor_parallel.vocab_parallel_lm_head", sharded, field))
    if layout.sequence_parallel_size > 1:
        field = "parallel.sequence_parallel_size"
        owned.append(Owned("sequence_parallel_size", layout.sequence_parallel_size, field))
    if layout.expert_parallel_size > 1:
        field = "parallel.expert_parallel_size"
        owned.append(Owned("expert_parallel.enabled", True, field))
        owned.append(Owned("expert_parallel.autoep_size", layout.expert_parallel_size, field))
        owned.append(Owned("expert_parallel.preset_model", EXPERT_PRESETS.get(model_type or "", ""), field))
    if recipe.profiling.flops_step is not None:
        owned.append(Owned("flops_profiler.enabled", True, "profiling.flops_step"))
        owned.append(Owned("flops_profiler.profile_step", recipe.profiling.flops_step, "profiling.flops_step"))
    if zero.hpz_partition_size is not None:
        path = "zero_optimization.zero_hpz_partition_size"
        owned.append(Owned(path, zero.hpz_partition_size, "zero.hpz_partition_size"))
    for name in ("offload_optimizer", "offload_param"):
        device = getattr(zero, name)
        if device is not None:
            owned.append(Owned(f"zero_optimization.{name}.device", device, f"zero.{name}"))
        if device == "nvme" and zero.nvme_path is not None:
            owned.append(Owned(f"zero_optimization.{name}.nvme_path", zero.nvme_path, "zero.nvme_path"))
    return owned
