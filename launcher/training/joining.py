"""How tensor-parallel ranks divide a model's weights, and putting their parts together."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import CheckpointError
from launcher.models.parallel import ROW

_ROW = "parameter_with_row_parallelism_patterns"
_REPLICATED = "tp_replicated_parameter_patterns"


def pipeline_patterns(names: Collection[str]) -> dict[str, Any]:
    """What DeepSpeed writes down for AutoTP, for our own stages (`models.pipeline`), of which it writes nothing.

    Args:
        names: of all weights, as in the whole model.
    """
    row = "|".join(ROW)
    patterns = {_ROW: [rf".*\.({row})\.weight$"], _REPLICATED: [r".*norm\.", rf".*\.({row})\.bias$"]}
    if "lm_head.weight" in names:
        patterns[_REPLICATED].append(r"model\.embed_tokens\.")  # an embedding that is not the head too
    return patterns


def split_patterns(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed wrote down of AutoTP's split into a checkpoint's model states.

    Raises:
        CheckpointError: it wrote nothing.
    """
    patterns: dict[str, Any] | None = state.get("universal_checkpoint_info")
    if not patterns:
        raise CheckpointError(f"checkpoint {folder} does not say how its tensor-parallel ranks split the weights")
    return patterns


def divided_dimension(name: str, patterns: Mapping[str, Any]) -> int | None:
    """Along which dimension the ranks divide a weight; `None` when each of them has it whole.

    Args:
        name: of the weight in the whole model.
        patterns: DeepSpeed's `universal_checkpoint_info`: regular expressions of the names of replicated parameters and
            of those split along the input dimension; all others are split along the first.
    """
    if _matches(name, patterns.get(_REPLICATED, ())):
        return None
    return 1 if _matches(name, patterns.get(_ROW, ())) else 0


def joined(parts: Sequence[Mapping[str, Tensor]], patterns: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Put the parts of tensor-parallel ranks together, a weight at a time.

    Args:
        parts: state of each tensor-parallel rank, in order.
        patterns: as for `divided_dimension`.
    """
    for name in parts[0]:
        if all(name in part for part in parts):  # the other name of a tied weight is written down on one rank only
            yield name, whole([part[name] for part in parts], divided_dimension(name, patterns))


def whole(parts: Sequence[Tensor], dim: int | None) -> Tensor:
    """One weight, of each tensor-parallel rank's part of it; `dim` as from `divided_dimension`."""
    return parts[0] if dim is None else torch.cat(list(parts), dim)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
