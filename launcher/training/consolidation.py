"""From a checkpoint's files, in whatever layout they were saved, to whole weights under transformers' names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.training.averaging import average_file, has_averages, read_averages
from launcher.training.checkpoint_files import read_state
from launcher.training.joining import joined, split_patterns
from launcher.training.shards import AVERAGE
from launcher.training.whole_states import WholeStates


def averaged_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Give a checkpoint's averaged weights (`training.ema`) one after another, in fp32; else as `whole_weights`.

    Buffers, and weights that are not trained, have no average and come as they are.

    Raises:
        CheckpointError: it holds none.
    """
    if not has_averages(manifest):
        raise CheckpointError(f"checkpoint {folder} was saved without training.ema: it holds no averaged weights")
    if manifest.zero_stage == 0:
        state = read_state(folder / "mp_rank_00_model_states.pt", mapped=True)
        names = [name for group in state["parameter_names"] for name in group]
        averages = dict(zip(names, read_averages(folder / average_file(0), mapped=True), strict=True))
        aliases = state["shared_params"] or {}
        yield from ((name, averages.get(name, own)) for name, own in state["module"].items() if name not in aliases)
        return
    states = WholeStates(folder, manifest)
    for name in states.shapes:
        yield name, states.tensor(name, AVERAGE)
    yield from states.extras.items()


def trained_state_dict(folder: Path, zero_stage: int) -> dict[str, Any]:
    """Read what an adapter's checkpoint holds: the trained weights only, in fp32 where it has fp32 ones."""
    if zero_stage == 0:
        module: dict[str, Any] = read_state(folder / "mp_rank_00_model_states.pt")["module"]
        return module
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    merged: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
    )
    return merged


def whole_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Give a checkpoint's whole weights one after another, on the host, in fp32 where the checkpoint has fp32 ones.

    The files are mapped, not read: only the weight that is given lies in memory. (Of experts all do.)

    Args:
        folder: of a complete checkpoint.
        manifest: of it.

    Yields:
        Name and values, of buffers too; the other names of tied weights may be left out.

    Raises:
        CheckpointError: the files do not hold what DeepSpeed writes.
    """
    if manifest.layout.expert_parallel_size > 1:
        yield from _expert_state_dict(folder).items()
    elif manifest.zero_stage == 0:
        yield from _replicated_weights(folder, manifest.layout.tensor_parallel_size)
    else:
        states = WholeStates(folder, manifest)
        for name in states.shapes:
            yield name, states.tensor(name, "fp32")
        yield from states.extras.items()


def _replicated_weights(folder: Path, tensor_parallel_size: int) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 0: every data-parallel rank has all weights of its part of the model."""
    names = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tensor_parallel_size)]
    states = [read_state(folder / name, mapped=True) for name in names]
    modules = [state["module"] for state in states]
    return iter(modules[0].items()) if len(modules) == 1 else joined(modules, split_patterns(folder, states[0]))


def _expert_state_dict(folder: Path) -> dict[str, Any]:
    """Join the files of AutoEP's experts (`runtime/engine.py: _save_moe_checkpoint`), in the engine's precision.

    AutoEP keeps transformers' fused `gate_up_proj` as two matrices, `w1` and `w3`, and calls router and shared expert
    otherwise (`module_inject/auto_ep_layer.py: AutoEPMoELayer`).
    """
    whole: dict[str, Any] = {
        name.replace(".mlp.router.gate.", ".mlp.gate.").replace(".mlp.shared_experts", ".mlp.shared_expert"): tensor
        for name, tensor in read_state(folder / "mp_rank_00_model_states.pt")["module"].items()
        if not name.endswith(".mlp.gate.gate.weight")  # the router again, under the name by which outputs are captured
    }
    experts: dict[str, dict[int, Tensor]] = {}
    for path in folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt"):
        for name, tensor in read_state(path).items():
            matrix, _, index = name.rpartition(".")
            experts.setdefault(matrix, {})[int(index)] = tensor
    stacked = {name: torch.stack([parts[index] for index in sorted(parts)]) for name, parts in experts.items()}
    for name in [name for name in stacked if name.endswith(".w1")]:
        layer = name.removesuffix(".w1")
        whole[f"{layer}.gate_up_proj"] = torch.cat([stacked[name], stacked[f"{layer}.w3"]], dim=1)
        whole[f"{layer}.down_proj"] = stacked[f"{layer}.w2"]
    return whole
