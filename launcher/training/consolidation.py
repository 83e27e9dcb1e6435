"""From a checkpoint's files, in whatever layout they were saved, to whole weights under transformers' names."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import CheckpointError
from launcher.models.parallel import ROW
from launcher.models.pieces import transformers_name
from launcher.planning.layout import Layout
from launcher.training.checkpoint_files import read_state

_ROW = "parameter_with_row_parallelism_patterns"
_REPLICATED = "tp_replicated_parameter_patterns"


def trained_state_dict(folder: Path, zero_stage: int) -> dict[str, Any]:
    """Read what an adapter's checkpoint holds: the trained weights only, in fp32 where it has fp32 ones."""
    if zero_stage == 0:
        return _model_state_dict(folder, zero_stage)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    merged: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
    )
    return merged


def consolidated_state_dict(folder: Path, zero_stage: int, layout: Layout) -> dict[str, Any]:
    """Read a checkpoint's whole weights on the host, in fp32 where the checkpoint has fp32 ones.

    Args:
        folder: of a complete checkpoint.
        zero_stage: of the engine that saved it.
        layout: that saved it.
    """
    if layout.pipeline_parallel_size > 1:
        return _pipeline_state_dict(folder, layout)
    if layout.expert_parallel_size > 1:
        return _expert_state_dict(folder)
    if layout.tensor_parallel_size == 1:
        return _model_state_dict(folder, zero_stage)
    parts = []
    for tensor_rank in range(layout.tensor_parallel_size):
        with tempfile.TemporaryDirectory() as view:
            parts.append(_model_state_dict(_view_of_rank(folder, tensor_rank, Path(view)), zero_stage))
    return joined(parts, _partition_patterns(folder))


def _model_state_dict(folder: Path, zero_stage: int) -> dict[str, Any]:
    if zero_stage == 0:
        states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        module: dict[str, Any] = states["module"]
        return module
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    merged: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return merged


def _pipeline_state_dict(folder: Path, layout: Layout) -> dict[str, Any]:
    """Join the files of a pipeline's layers (`runtime/pipe/module.py: save_state_dict`), in the engine's precision."""
    layers: dict[int, list[dict[str, Tensor]]] = {}
    for path in sorted(folder.glob("layer_*-model_states.pt")):
        layers.setdefault(int(path.name[6:].partition("-")[0]), []).append(read_state(path))
    row = "|".join(ROW)
    patterns = {_ROW: [rf".*\.({row})\.weight$"], _REPLICATED: [r"norm\.", r".*norm\.", rf".*\.({row})\.bias$"]}
    if any("head.weight" in part for parts in layers.values() for part in parts):
        patterns[_REPLICATED].append(r"embedding\.")  # an embedding that is not the head too
    whole: dict[str, Any] = {}
    for index, parts in layers.items():
        if len(parts) != layout.tensor_parallel_size:
            raise CheckpointError(
                f"{folder} holds {len(parts)} parts of layer {index} for {layout.tensor_parallel_size} ranks"
            )
        layer = joined(parts, patterns) if len(parts) > 1 else parts[0]
        whole |= {transformers_name(f"{index}.{name}"): tensor for name, tensor in layer.items()}
    return whole


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


def _view_of_rank(folder: Path, tensor_rank: int, view: Path) -> Path:
    """A folder of links to one tensor-parallel rank's files, under the names that a run without others would give.

    `deepspeed/utils/zero_to_fp32.py` reads rank 0's only, and counts the others' as too many.
    """
    target = view / folder.name
    target.mkdir()
    for path in folder.iterdir():
        if f"mp_rank_{tensor_rank:02d}_" in path.name:
            link = target / path.name.replace(f"mp_rank_{tensor_rank:02d}_", "mp_rank_00_")
            link.symlink_to(path.resolve())
    return target


def _partition_patterns(folder: Path) -> dict[str, Any]:
    """What DeepSpeed writes of the tensor-parallel split of each parameter, for its universal checkpoints."""
    path = next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt"))))
    states = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    patterns: dict[str, Any] | None = states.get("universal_checkpoint_info")
    if not patterns:
        raise CheckpointError(f"checkpoint {folder} does not say how its tensor-parallel ranks split the weights")
    return patterns


def joined(parts: Sequence[Mapping[str, Tensor]], patterns: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put the shards of tensor-parallel ranks together.

    Args:
        parts: state of each tensor-parallel rank, in order.
        patterns: DeepSpeed's `universal_checkpoint_info`: regular expressions of the names of replicated parameters and
            of those split along the input dimension; all others are split along the first.
    """
    whole = {}
    for name, first in parts[0].items():
        if any(name not in part for part in parts):
            continue  # the other name of a tied weight, which DeepSpeed writes down on one rank only
        if _matches(name, patterns.get(_REPLICATED, ())):
            whole[name] = first
        else:
            dim = 1 if _matches(name, patterns.get(_ROW, ())) else 0
            whole[name] = torch.cat([part[name] for part in parts], dim=dim)
    return whole


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
