"""Loading the universal form into an engine of any ZeRO stage, and mending what DeepSpeed leaves wrong."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import CheckpointError
from launcher.models.pieces import transformers_name
from launcher.training import upstream
from launcher.training.checkpoint_files import read_state
from launcher.training.shards import STATES
from launcher.training.universal import EXTRAS


def load_universal(engine: Any, folder: Path, zero_stage: int) -> None:
    """Load weights, optimizer, loss scale, schedule and counters into an engine whose `checkpoint_engine` is ours.

    Args:
        engine: fresh from `deepspeed.initialize`.
        folder: of a universal checkpoint.
        zero_stage: of the engine.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    names = whole_names(engine)
    missing = [
        name
        for parameter, name in names.items()
        if parameter.requires_grad and not (folder / "zero" / name / "fp32.pt").is_file()
    ]
    if missing:
        raise CheckpointError(f"{folder} does not hold the plan's model; it lacks {', '.join(missing[:5])}")
    if zero_stage == 0:
        _load_replicated(engine, folder)
    else:
        with upstream.loading_universal(engine, names):
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
        groups = read_state(folder / "zero/optimizer_state.pt")["param_groups"]
        upstream.mend_optimizer_after_universal_load(engine.optimizer.optimizer, groups)
    _load_extras(engine, read_state(folder / EXTRAS), zero_stage)


def whole_names(engine: Any) -> dict[torch.nn.Parameter, str]:
    """What each of this rank's parameters is called in the whole model, under which the universal form keeps it."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if not engine.pipeline_parallelism:
        return names
    return {parameter: transformers_name(name) for parameter, name in names.items()}


def _load_replicated(engine: Any, folder: Path) -> None:
    """ZeRO 0, for which DeepSpeed has no way to load the universal form: `engine.optimizer` is PyTorch's own.

    Every rank has the whole model here: `checkpoints.resumable` refuses the others.
    """
    state = read_state(folder / "mp_rank_00_model_states.pt")
    saved = read_state(folder / "zero/optimizer_state.pt")
    inner: dict[str, Any] = {"state": {}, "param_groups": []}
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for group, options in zip(engine.optimizer.param_groups, saved["param_groups"], strict=True):
        first = len(inner["state"])
        for parameter in group["params"]:
            place = folder / "zero" / names[parameter]
            values = {key: read_state(place / f"{key}.pt", mapped=True)["param"].clone() for key in STATES}
            with torch.no_grad():
                parameter.copy_(values.pop("fp32"))
            inner["state"][len(inner["state"])] = {"step": read_state(place / "step.pt"), **values}
        inner["param_groups"].append({**options, "params": list(range(first, len(inner["state"])))})
    engine.optimizer.load_state_dict(inner)
    engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, state[counter])


def _load_extras(engine: Any, extras: dict[str, torch.Tensor], zero_stage: int) -> None:
    """Buffers and frozen parameters; under ZeRO 3 the parameters are gathered for it and rank 0 writes."""
    import deepspeed

    if not extras:
        return
    places = {**dict(engine.module.named_buffers()), **dict(engine.module.named_parameters(remove_duplicate=False))}
    with torch.no_grad():
        for name, value in extras.items():
            place = places[name]
            partitioned = [place] if zero_stage == 3 and hasattr(place, "ds_id") else []
            with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
                if not partitioned or dist.get_rank() == 0:
                    place.copy_(value)
