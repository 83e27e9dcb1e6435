"""Runs with optimizer states on NVMe that are small, and large enough for some of them to be in files."""

from pathlib import Path

STEPS = 8
MODEL = (
    "model.config={model_type: llama, hidden_size: 128, intermediate_size: 4096, num_hidden_layers: 1,"
    " num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64}"
)
"""Half of a matrix of its MLP is 1 MiB of gradients, the least that passes through a file."""
SETTINGS = (
    MODEL, "zero.stage=3", "deepspeed.overrides.zero_optimization.sub_group_size=300000", f"max_steps={STEPS}",
    "micro_batch_size=1", "gradient_accumulation_steps=null", "global_batch_size=4", "eval_steps=1000",
)  # fmt: skip
"""Two sub-groups of the matrices are in files; the rest of them and the norms are too small for it."""


def on_nvme(disk: Path) -> tuple[str, ...]:
    """Overrides that put a run's optimizer states into a folder."""
    return ("zero.offload_optimizer=nvme", f"zero.nvme_path={disk}")
