"""What DeepSpeed leaves on a tensor-parallel rank; runs in the processes of `ranks.py`."""

from typing import Any

import torch


def tensor_parallel_shapes(config: dict[str, Any], ranks: int) -> dict[str, list[int]]:
    """Shapes of the parameters on this rank after AutoTP has divided a model, by name."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "tensor_parallel": {"autotp_size": ranks, "vocab_parallel_lm_head": True},
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    shapes = {name: list(parameter.shape) for name, parameter in engine.module.named_parameters()}
    engine.destroy()
    return shapes
