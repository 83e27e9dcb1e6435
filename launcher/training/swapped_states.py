"""Optimizer states that DeepSpeed 0.19.8 keeps on NVMe: how our checkpoints read and write them.

DeepSpeed copies its swap files beside a checkpoint and loads nothing but those (`runtime/engine.py: save_checkpoint`,
`load_checkpoint`, where `zero_nvme_offload_optimizer()` is asked), so that no other layout, and no export, could read
them. Here the states go into the same file as those of any ZeRO 3 run: a save maps the swap files instead of reading
them, so that they pass through memory once; a load fills one sub-group after the other and has the swapper write it.
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import RecipeError
from launcher.training.checkpoint_files import read_state

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_async_io() -> None:
    """Have DeepSpeed compile its operations for NVMe, or load those that it compiled before; once in each process.

    The first time takes minutes. Ranks take turns behind a lock that the kernel gives back: torch's own one
    (`torch/utils/file_baton.py`) stays behind when a process is killed, and everybody waits for it from then on.

    Raises:
        RecipeError: libaio or a compiler is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "zerofleet.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name in ("async_io", "pin_memory"):
            for stale in folder.glob(f"**/{name}/lock"):
                stale.unlink(missing_ok=True)
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise RecipeError.single(
                "zero.offload_optimizer",
                "is nvme, and DeepSpeed cannot compile its async_io operation here: install libaio's headers (Debian: "
                "libaio-dev) and a C++ compiler on each node, or set it to cpu",
            )
        AsyncIOBuilder().load(verbose=False)


def keep_whole_states(engine: Any) -> None:
    """Let an engine whose optimizer is on NVMe save and load its states as one without it does."""
    optimizer = engine.optimizer
    original = optimizer.state_dict

    def state_dict() -> dict[str, Any]:
        return _with_files(optimizer, original())

    def load_state_dict(state_dict_list: Any, *args: Any, checkpoint_folder: Any = None, **kwargs: Any) -> None:
        if checkpoint_folder:
            _load_universal(optimizer, Path(checkpoint_folder))
        else:
            _load_own(optimizer, state_dict_list[dist.get_rank(group=optimizer.dp_process_group)])

    engine.zero_nvme_offload_optimizer = lambda: False
    optimizer.state_dict = state_dict
    optimizer.load_state_dict = load_state_dict


def _with_files(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What `_rigid_state_dict` returns (`runtime/zero/stage3.py`), with swap files in the place of empty tensors.

    The swapper writes a sub-group's files before a step ends (`swap_tensor/partitioned_optimizer_swapper.py:
    _swap_out_optimizer_state` waits for them), past the page cache, so a new mapping has what is on the disk.
    """
    states, weights = dict(saved["optimizer_state_dict"]["state"]), list(saved["fp32_flat_groups"])
    for index, flat in enumerate(weights):
        if optimizer._swappable_optimizer_subgroup(index):
            swap = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
            files = {id(context.compute_tensor): context.swap_path for context in swap.tensors}
            weights[index] = _mapped(files[id(flat)], swap.numel())
            states[index] = {
                key: _mapped(files[id(value)], swap.numel()) if id(value) in files else value
                for key, value in states.get(index, {}).items()
            }
    inner = {**saved["optimizer_state_dict"], "state": states}
    return {**saved, "optimizer_state_dict": inner, "fp32_flat_groups": weights}


def _mapped(path: str, numel: int) -> torch.Tensor:
    return torch.from_file(path, shared=False, size=numel, dtype=torch.float32)


def _load_own(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """What `_rigid_load_state_dict` does, a sub-group at a time (`runtime/zero/stage3.py`)."""
    optimizer._load_global_state_stage3(saved)
    inner = saved["optimizer_state_dict"]
    for group, options in zip(optimizer.optimizer.param_groups, inner["param_groups"], strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})
    for index, weights in enumerate(saved["fp32_flat_groups"]):
        _fill(optimizer, index, weights, inner["state"].get(index, {}))
    _gather_again(optimizer)


def _load_universal(optimizer: Any, folder: Path) -> None:
    """What `load_hp_checkpoint_state_from_checkpoint_dir_stage3` does, a sub-group at a time."""
    common = read_state(folder / "zero/optimizer_state.pt")
    optimizer._load_global_state_stage3(common)
    step = common["optimizer_state_dict"]["state"][0]["step"]
    for index, group in enumerate(optimizer.fp16_groups):
        places = [(str(folder / "zero" / optimizer.param_names[parameter]), parameter) for parameter in group]

        def flat(key: str, places: list[tuple[str, Any]] = places) -> torch.Tensor:
            return torch.cat([optimizer.load_hp_checkpoint_state(place, key, param=own) for place, own in places])

        _fill(optimizer, index, flat("fp32"), {"step": step, **{key: flat(key) for key in _MOMENTS}})
    _gather_again(optimizer)


@torch.no_grad()
def _fill(optimizer: Any, index: int, weights: torch.Tensor, states: Mapping[str, Any]) -> None:
    """Give a sub-group its weights and states, use the weights, and have all of it written to its files.

    After the swapper forgets the states that it knew (`purge_state`, for one sub-group), it takes the new ones for
    those of a first step and writes them with the weights (`_update_param_state_info`, `_swap_out_optimizer_state`).
    """
    flat = optimizer.fp32_partitioned_groups_flat[index]
    swapped = optimizer._swappable_optimizer_subgroup(index)
    optimizer.optimizer.state.pop(flat, None)
    if swapped:
        swap = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
        swap.tensors, swap.has_state_tensors = swap.tensors[:1], False
        swap.release_unswapped_gradients()
        optimizer._optimizer_states_and_gradient_swap_in(index)
    flat.data.copy_(weights)
    if states:
        own = {key: value.clone() if torch.is_tensor(value) else value for key, value in states.items()}
        optimizer.optimizer.state[flat] = own
    optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(index)


def _gather_again(optimizer: Any) -> None:
    """Let parameters that are kept whole be made anew from the loaded parts, as `load_state_dict` does."""
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
