"""Layers compiled by torch (`training.torch_compile`), and Liger's kernels (`model.kernels`)."""

import importlib.util
import os
from typing import Any

import torch
from torch import nn

from launcher.planning.plan import Plan


def compile_layers(model: Any) -> int:
    """Have torch compile each decoder layer when it first runs; returns how many there are.

    Layers are alike, so that one compilation serves all of them: it takes a fraction of the whole model's time.
    """
    # Workers on CPU switch the compiler off, whose import takes seconds (launcher.orchestration.worker).
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    torch._dynamo.config.disable = False
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.compile()
    return len(layers)


def use_kernels(model: nn.Module, plan: Plan, device: torch.device) -> str | None:
    """Put Liger's fused kernels in the place of the model's norms, rotary embeddings and MLPs, if there are any.

    The loss stays this project's own: the head's logits are needed for it.

    Returns:
        Why PyTorch's own kernels are used although the recipe says `auto`; `None` when they are not, or it does not.
    """
    if plan.recipe.model.kernels != "auto":
        return None
    where = "model.kernels: auto uses PyTorch's own kernels"
    if device.type != "cuda":
        return f"{where}: Liger's need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return f"{where}: the package liger-kernel is not installed"
    from liger_kernel.transformers import monkey_patch

    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"{where}: liger-kernel has none for {family}"
    monkey_patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return None
