"""How tensor-parallel ranks divide a model's weights, and putting their parts together."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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


def joined(parts: Sequence[Mapping[str, Tensor]], patterns: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put the shards of tensor-parallel ranks together.

    Args:
        parts: state of each tensor-parallel rank, in order.
        patterns: as for `divided_dimension`.
    """
    whole = {}
    for name, first in parts[0].items():
        if any(name not in part for part in parts):
            continue  # the other name of a tied weight, which DeepSpeed writes down on one rank only
        dim = divided_dimension(name, patterns)
        whole[name] = first if dim is None else torch.cat([part[name] for part in parts], dim=dim)
    return whole


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
