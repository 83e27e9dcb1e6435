"""Optimizer states on NVMe (ZeRO-Infinity, arXiv 2104.07857): what goes with them, and the bytes that they take.

DeepSpeed 0.19.8 cuts a rank's part of each parameter group into sub-groups (`runtime/zero/stage3.py:
_create_fp16_sub_groups`). The fp32 weights and the states of each lie in files, from which one sub-group after the
other is read into a few buffers, updated and written back; gradients of large parameters pass through files too.
Sub-groups and gradients that are smaller than a block stay in host memory
(`runtime/swap_tensor/optimizer_utils.py: is_swappable_tensor`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from launcher.errors import Problem
from launcher.planning.parameters import ParameterTensor
from launcher.recipe.schema import Recipe

_FP32 = 4
_SMALLEST_BYTES = 2**20
"""`runtime/swap_tensor/utils.py: MIN_AIO_BYTES`."""
_ALIGNED_BYTES = 1024
"""`runtime/swap_tensor/utils.py: AIO_ALIGNED_BYTES`."""
BUFFERS = 4
"""What Adam needs at once: weights, gradients and two moments; DeepSpeed's default."""

_ASYNCHRONOUS = ("pipeline_read", "pipeline_write")
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_ASYNCHRONOUS, (False,)),
    "super_offload": (False,),
    "ratio": (1, 1.0),
}
"""Keys of `offload_optimizer` -> the values with which a test of ours has trained."""


@dataclass(frozen=True)
class SwapSettings:
    """What the sizes of files and buffers depend on.

    Attributes:
        sub_group_size: elements after which a sub-group ends.
        buffers: `offload_optimizer.buffer_count`.
        smallest: bytes from which a tensor lies in a file.
        alignment: bytes, of which a file's size is a multiple.
    """

    sub_group_size: int = 1_000_000_000
    buffers: int = BUFFERS
    smallest: int = _SMALLEST_BYTES
    alignment: int = _ALIGNED_BYTES


@dataclass(frozen=True)
class Swapped:
    """Elements of a rank's part, by where their states are.

    Attributes:
        in_files: of states, padding included; each state of theirs is a file.
        gradients: that pass through files.
        in_memory: of states.
        loose: whose states are in files, and whose gradients in host memory between backward pass and step.
        buffers: of all buffers together.
    """

    in_files: int
    gradients: int
    in_memory: int
    loose: int
    buffers: int


def swap_settings(deepspeed_config: Mapping[str, Any]) -> SwapSettings | None:
    """Read the settings from a resolved DeepSpeed config; `None` when its optimizer is not on NVMe."""
    zero = deepspeed_config.get("zero_optimization", {})
    section = zero.get("offload_optimizer") or {}
    if section.get("device") != "nvme":
        return None
    aio = deepspeed_config.get("aio") or {}
    default = SwapSettings()
    return SwapSettings(
        sub_group_size=int(zero.get("sub_group_size", default.sub_group_size)),
        buffers=int(section.get("buffer_count", BUFFERS)),
        smallest=max(_SMALLEST_BYTES, int(aio.get("block_size", 0))),
        alignment=_ALIGNED_BYTES * int(aio.get("intra_op_parallelism", 1)),
    )


def swapped(groups: Sequence[Sequence[ParameterTensor]], ranks: int, settings: SwapSettings) -> Swapped:
    """Where the states of a rank's part lie.

    Args:
        groups: trained parameters, as the optimizer groups them.
        ranks: that divide each parameter among them.
        settings: of the files.
    """
    in_files = gradients = in_memory = loose = largest = 0
    for sub_group in _sub_groups(groups, ranks, settings.sub_group_size):
        numel = sum(sub_group)
        largest = max(largest, numel)
        if numel * _FP32 < settings.smallest:
            in_memory += numel
            continue
        in_files += _aligned(numel, settings)
        whole = [_whole_blocks(part, settings) for part in sub_group]
        gradients += sum(whole)
        loose += numel - sum(whole)
    return Swapped(in_files, gradients, in_memory, loose, settings.buffers * _aligned(largest, settings))


def _sub_groups(groups: Sequence[Sequence[ParameterTensor]], ranks: int, size: int) -> Iterator[list[int]]:
    """Elements of a rank's part of each parameter, sub-group by sub-group."""
    for group in groups:
        parts = [-(-tensor.numel // ranks) for tensor in group]
        sub_group: list[int] = []
        for part in parts:
            sub_group.append(part)
            if sum(sub_group) >= size:
                yield sub_group
                sub_group = []
        if sub_group:
            yield sub_group


def _aligned(numel: int, settings: SwapSettings) -> int:
    unit = settings.alignment // _FP32
    return -(-numel // unit) * unit


def _whole_blocks(numel: int, settings: SwapSettings) -> int:
    """Elements of a gradient that pass through a file: none of a small one, and of a large one all but the rest."""
    unit = settings.alignment // _FP32
    return numel // unit * unit if numel * _FP32 >= settings.smallest else 0


def nvme_problems(recipe: Recipe, deepspeed_config: Mapping[str, Any]) -> list[Problem]:
    """Refuse what no test of ours has trained with states on NVMe; empty when all is well, or nothing is there.

    Args:
        recipe: to train.
        deepspeed_config: resolved.
    """
    zero: Mapping[str, Any] = deepspeed_config.get("zero_optimization", {})
    section = zero.get("offload_optimizer") or {}
    if section.get("device") != "nvme":
        unused = recipe.zero.nvme_path is not None
        return [Problem("nothing is offloaded to nvme; leave it out", "zero.nvme_path")] if unused else []
    return [*_path_problems(section.get("nvme_path")), *_setting_problems(recipe, zero, section, deepspeed_config)]


def _path_problems(path: Any) -> Iterable[Problem]:
    if path is None:
        message = "is not set, and states are offloaded to nvme; set it to a folder on a disk of each node"
        yield Problem(message, "zero.nvme_path")
    elif not PurePosixPath(str(path)).is_absolute():
        message = f"is {str(path)!r}; set it to an absolute path: workers of other nodes start elsewhere"
        yield Problem(message, "zero.nvme_path")


def _setting_problems(
    recipe: Recipe, zero: Mapping[str, Any], section: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterable[Problem]:
    where = "zero.offload_optimizer"
    if recipe.optimizer.type != "adamw" or not config["optimizer"]["params"].get("torch_adam", True):
        yield Problem("is nvme, and is proved with adamw of PyTorch alone (torch_adam); set it to cpu", where)
    if recipe.training.precision == "fp16":
        yield Problem("is nvme, and is proved in fp32 and bf16; set it to cpu, or training.precision to bf16", where)
    if recipe.adapter is not None or recipe.model.freeze:
        yield Problem("is nvme, where no test of ours has trained a model in part; set it to cpu", where)
    if recipe.optimizer.layer_wise_lr_decay is not None or recipe.optimizer.unfreeze_every_steps is not None:
        yield Problem("is nvme, where no test of ours has trained layers at rates of their own; set it to cpu", where)
    if recipe.fault_tolerance.memory_checkpoint is not None:
        message = "keeps in host memory what zero.offload_optimizer nvme moves out of it; leave one of them out"
        yield Problem(message, "fault_tolerance.memory_checkpoint")
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        yield Problem("goes with no offload_param in a test of ours; leave one of them out", where)
    for key, values in _FIXED.items():
        if section.get(key, values[0]) not in values:
            reason = ", whose files change while a checkpoint reads them" if key in _ASYNCHRONOUS else ""
            yield Problem(f"{key} = {section[key]!r} is not proved with nvme{reason}; leave it out", f"{where}.{key}")
    if section.get("buffer_count", BUFFERS) < BUFFERS:
        message = f"is {section['buffer_count']}, and Adam needs {BUFFERS} at once: weights, gradients, two moments"
        yield Problem(f"{message}; set it to {BUFFERS} or more", f"{where}.buffer_count")
