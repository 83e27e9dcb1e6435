"""Pretrained weights under ZeRO 3, streamed: each rank reads its own part of each tensor from the safetensors files.

transformers 5.23 merges all files of a model in the memory of rank 0, gathers every weight whole on every rank and
broadcasts it (`modeling_utils.py: _load_pretrained_model`, `integrations/deepspeed.py:
_load_state_dict_into_zero3_model`). Here no weight is sent at all, every byte of a file is read by one rank, and a rank
holds nothing but its own part and the piece that it is reading. Weights that transformers makes of several stored ones
(the experts of a mixture, stacked) are the exception: each rank reads and makes them whole, one at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

Elements = Callable[[int, int], Tensor]
"""Reads elements `begin` to `end` of a flattened tensor."""


@contextmanager
def streamed_weights() -> Iterator[None]:
    """Let `from_pretrained` fill a model that ZeRO 3 takes apart by streaming.

    What has no safetensors, is quantised, or is offloaded to NVMe is loaded as transformers does it.
    """
    original = PreTrainedModel._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        files = [] if state_dict is not None or load_config.is_quantized else [str(file) for file in checkpoint_files]
        if files and all(file.endswith(".safetensors") for file in files) and _is_plainly_partitioned(model):
            return stream(model, files, load_config.weight_mapping or []), None
        return original(model, state_dict, checkpoint_files, load_config, expected_keys)

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        with _no_broadcast_of_empty_weights():
            yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)


@contextmanager
def _no_broadcast_of_empty_weights() -> Iterator[None]:
    """Keep `deepspeed.zero.Init` from sending each new weight to all ranks before it takes it apart.

    `runtime/zero/partition_parameters.py: _zero_init_param`. What is in them is replaced: by what the files hold, or by
    transformers' random weights, which rank 0 makes for all. Sent whole, they would be in the memory of every rank.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    original = Init._zero_init_param

    def take_apart(self: Any, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    Init._zero_init_param = take_apart
    try:
        yield
    finally:
        Init._zero_init_param = original


def _is_plainly_partitioned(model: torch.nn.Module) -> bool:
    """Whether each parameter's part is a tensor in memory, and the only copy of it."""
    return all(
        hasattr(parameter, "ds_tensor")
        and parameter.ds_tensor.final_location is None
        and not hasattr(parameter.ds_tensor, "ds_quant_scale")
        and getattr(parameter, "ds_secondary_tensor", None) is None
        for parameter in model.parameters()
    )


def stream(model: Any, files: Sequence[str], weight_mapping: Sequence[Any]) -> Any:
    """Fill a model that `deepspeed.zero.Init` has taken apart, on every rank, with what the files hold.

    Args:
        model: of transformers.
        files: safetensors, with every tensor of the checkpoint in one of them.
        weight_mapping: transformers' renamings and conversions from stored to built names.

    Returns:
        transformers' record of what was missing, unexpected or of another shape; the same on every rank.
    """
    targets: dict[str, Any] = model.state_dict(keep_vars=True)
    info = LoadStateDictInfo(
        missing_keys=set(targets),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    with ExitStack() as stack, torch.no_grad():
        # Read, not mapped: the pages of a mapped file would count as this rank's memory until the file is closed.
        opened = [stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in files]
        stored = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  # not a dictionary
        renamed, converted = _destinations(sorted(stored, key=dot_natural_key), targets, model, weight_mapping, info)
        for target, key in renamed.items():
            piece = stored[key].get_slice(key)
            _fill(targets[target], target, tuple(piece.get_shape()), partial(_elements, piece), info)
        for first, (converter, keys) in converted.items():
            for pattern, key in keys:
                converter.add_tensor(first, key, pattern, partial(stored[key].get_tensor, key))
            _fill_converted(converter, first, model, targets, info)
    _mark_full_modules(model)
    model._weight_conversions = [entry for entry in weight_mapping if entry.was_used()]
    return info


def _destinations(
    stored: Sequence[str], targets: dict[str, Any], model: Any, weight_mapping: Sequence[Any], info: Any
) -> tuple[dict[str, str], dict[str, tuple[Any, list[tuple[str, str]]]]]:
    """Where each stored tensor goes, by transformers' rules (`convert_and_load_state_dict_in_model`).

    Returns:
        The stored name of each weight that is stored as it is; and for each group of weights that are made of others,
        by the name of its first one, the converter and its sources as pairs of pattern and stored name.
    """
    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    converted: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in stored:
        target, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if target not in targets and key in targets:
            target, pattern = key, None
        if target not in targets:
            info.unexpected_keys.add(target)
        elif pattern is None:
            renamed[target] = key
        else:
            converted.setdefault(target, (deepcopy(by_pattern[pattern]), []))[1].append((pattern, key))
    return renamed, converted


def _elements(piece: Any, begin: int, end: int) -> Tensor:
    """Elements of a stored tensor, flat; the rows that hold them are read, and no others."""
    shape = piece.get_shape()
    if not shape:
        whole: Tensor = piece[...]
        return whole.reshape(1)[begin:end]
    row = math.prod(shape[1:])
    first, last = begin // row, -(-end // row)
    rows: Tensor = piece[first:last]
    return rows.reshape(-1)[begin - first * row : end - first * row]


def _of_whole(whole: Tensor, begin: int, end: int) -> Tensor:
    return whole.reshape(-1)[begin:end]


def _fill_converted(converter: Any, first: str, model: Any, targets: dict[str, Any], info: Any) -> None:
    """Make a group of weights and keep this rank's part of each; what was made whole is gone when this returns."""
    made = converter.convert(first, model=model, config=model.config, loading_info=info)
    for target, tensor in made.items():
        whole = tensor[0] if isinstance(tensor, list) else tensor
        if target in targets:
            _fill(targets[target], target, tuple(whole.shape), partial(_of_whole, whole), info)
        else:
            info.unexpected_keys.add(target)


def _mark_full_modules(model: torch.nn.Module) -> None:
    """Tell transformers which modules need no random weights.

    It looks at every weight besides, but some families compute with shapes first, which a partitioned weight has not
    (`models/resnet/modeling_resnet.py: _init_weights`).
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' flag


def _fill(target: Any, name: str, shape: tuple[int, ...], elements: Elements, info: Any) -> None:
    """Write this rank's part of a weight, or a whole buffer."""
    info.missing_keys.discard(name)
    expected = tuple(getattr(target, "ds_shape", target.shape))
    if shape != expected:
        info.mismatched_keys.add((name, shape, expected))
        return
    if hasattr(target, "ds_tensor"):
        part = target.ds_tensor
        begin = part.ds_numel * dist.get_rank(target.ds_process_group)
        size = max(0, min(part.ds_numel, target.ds_numel - begin))
        if size:
            part.narrow(0, 0, size).copy_(elements(begin, begin + size))
        part.narrow(0, size, part.ds_numel - size).zero_()
    elif target.numel():
        target.copy_(elements(0, target.numel()).view(shape))
    target._is_hf_initialized = True  # or transformers would give it random weights
