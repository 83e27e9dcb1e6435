"""What ranks can be asked about loading pretrained weights; runs in their processes."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

from launcher.models.build import build_model
from launcher.planning.plan import Plan
from launcher.tasks import make_task


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's type, shape and bytes."""
    content = tensor.detach().cpu().contiguous()
    binary = content.view(-1).view(torch.uint8).numpy().tobytes()
    return f"{content.dtype} {tuple(content.shape)} {hashlib.sha256(binary).hexdigest()}"


def load(plan: str, auto_class: str) -> dict[str, Any]:
    """Load a plan's model under ZeRO 3: digests of its weights and buffers, and whether it is partitioned."""
    import deepspeed

    made = Plan.model_validate_json(Path(plan).read_bytes())
    model: Any = build_model(made, getattr(transformers, auto_class))
    digests = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            digests[name] = digest(value)
    return {"partitioned": all(hasattr(each, "ds_tensor") for each in model.parameters()), "digests": digests}


def memory_of_a_build(plan: str) -> dict[str, int]:
    """Bytes of a rank's part of a model, and the most that were alive while it was built."""
    import cases  # of a rank: the test's own process imports this file too
    from live_storages import LiveStorages

    made = Plan.model_validate_json(Path(plan).read_bytes())
    with LiveStorages() as counter:
        model = make_task(made, {"pad_token_id": 0}).build_model()
    own = sum(parameter.nbytes for parameter in model.parameters())
    cases.forget_groups()
    return {"own": own, "peak": counter.peak}
