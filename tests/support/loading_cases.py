"""What ranks can be asked about loading pretrained weights; runs in their processes."""

import ctypes
import gc
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from launcher.models.build import build_model
from launcher.planning.plan import Plan


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's type, shape and bytes."""
    content = tensor.detach().cpu().contiguous()
    binary = content.view(-1).view(torch.uint8).numpy().tobytes()
    return f"{content.dtype} {tuple(content.shape)} {hashlib.sha256(binary).hexdigest()}"


def load(plan: str, auto_class: str, digests: bool = True) -> dict[str, Any]:
    """Load a plan's pretrained model under ZeRO 3.

    Returns:
        Digests of all weights and buffers that a checkpoint holds, by name; whether they are partitioned; the largest
        weight's, this rank's part's and the peak growth's bytes.
    """
    import deepspeed

    made = Plan.model_validate_json(Path(plan).read_bytes())
    _forget_peak()
    before = _status("VmRSS")
    model: Any = build_model(made, getattr(transformers, auto_class))
    growth = _status("VmHWM") - before
    parameters = list(model.parameters())
    result: dict[str, Any] = {
        "partitioned": all(hasattr(parameter, "ds_tensor") for parameter in parameters),
        "growth": growth,
        "shard": sum(parameter.ds_tensor.nbytes for parameter in parameters),
        "largest": max(parameter.ds_numel * parameter.element_size() for parameter in parameters),
    }
    if digests:
        result["digests"] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                result["digests"][name] = digest(value)
    return result


def _forget_peak() -> None:
    """Give back to the system what is free, and let the peak begin at what is used now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024
