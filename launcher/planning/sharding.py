"""Which parameters a rank holds before ZeRO divides them: its pipeline stage, and its share of matrices and experts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise

from launcher.planning.layout import Layout
from launcher.planning.parameters import ParameterTensor

_COLUMN = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"}
    | {"gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h"}
)
"""Matrices whose outputs are divided among tensor-parallel ranks."""
_ROW = frozenset({"o_proj", "out_proj", "dense", "down_proj", "c_proj", "fc2", "dense_4h_to_h"})
"""Matrices whose inputs are divided; their bias is added once, after the sum, and is whole on every rank."""

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class StageParameters:
    """What the ranks of one pipeline stage hold, each of them the same but for rounding.

    Attributes:
        first_layer: of the decoder layers of the stage.
        end_layer: one past its last decoder layer.
        has_head: computes logits and loss.
        parameters: each rank's share of those that are trained, in the model's order.
        frozen: its share of those that are only used.
    """

    first_layer: int
    end_layer: int
    has_head: bool
    parameters: tuple[ParameterTensor, ...]
    frozen: tuple[ParameterTensor, ...] = ()

    @property
    def num_layers(self) -> int:
        """Decoder layers of the stage."""
        return self.end_layer - self.first_layer

    @cached_property
    def num_trained(self) -> int:
        """Trained parameters on each rank."""
        return _numel(self.parameters)

    @cached_property
    def num_parameters(self) -> int:
        """Parameters on each rank."""
        return self.num_trained + _numel(self.frozen)

    @cached_property
    def dense(self) -> tuple[ParameterTensor, ...]:
        """Parameters that all data-parallel ranks hold."""
        return tuple(tensor for tensor in self.parameters if tensor.role != "expert")

    @cached_property
    def experts(self) -> tuple[ParameterTensor, ...]:
        """Parameters that the ranks of an expert-parallel group divide among them."""
        return tuple(tensor for tensor in self.parameters if tensor.role == "expert")

    @cached_property
    def num_sparse_layers(self) -> int:
        """Decoder layers with experts."""
        return len({layer_of(tensor) for tensor in (*self.parameters, *self.frozen) if tensor.role == "expert"})

    @cached_property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max((tensor.numel for tensor in self.parameters), default=0)

    @cached_property
    def largest_in_layers(self) -> int:
        """Elements of the largest trained parameter of a decoder layer."""
        return max((tensor.numel for tensor in self.parameters if layer_of(tensor) is not None), default=0)


def shard(
    parameters: Sequence[ParameterTensor],
    layout: Layout,
    vocabulary_parallel: bool = True,
    frozen: frozenset[str] = frozenset(),
) -> list[StageParameters]:
    """Divide a model's parameters among pipeline stages and the ranks inside of them.

    Matrices are divided as DeepSpeed 0.19.8's AutoTP does it (`module_inject/auto_tp.py`), after Megatron (arXiv
    1909.08053). The output head is divided along the vocabulary; so is a tied embedding, which is the same tensor,
    while an untied one is whole on every rank. A tied embedding is held by the first and by the last stage.

    Args:
        parameters: of the whole model, in transformers' order.
        layout: sizes of the groups; at most as many stages as there are layers.
        vocabulary_parallel: divide the head (and a tied embedding) as well.
        frozen: names of those that are not trained.
    """
    tied = all(tensor.role != "head" for tensor in parameters)
    tensors, experts = layout.tensor_parallel_size, layout.expert_parallel_size
    shares = [(layer_of(tensor), _share(tensor, tensors, experts, vocabulary_parallel, tied)) for tensor in parameters]
    weights = [0] * (1 + max(layer for layer, _ in shares if layer is not None))
    opening = [share for layer, share in shares if layer is None and share.role == "embedding"]
    closing = [share for layer, share in shares if layer is None and share.role != "embedding"]
    if tied and layout.pipeline_parallel_size > 1:
        closing += opening[:1]
    for layer, share in shares:
        if layer is not None:
            weights[layer] += share.numel
    borders = stage_borders(weights, _numel(opening), _numel(closing), layout.pipeline_parallel_size)
    stages = []
    for first, end in pairwise(borders):
        is_first, is_last = first == 0, end == len(weights)
        held = [
            share
            for layer, share in shares
            if (first <= layer < end if layer is not None else is_first if share.role == "embedding" else is_last)
        ]
        if is_last and not is_first and tied:
            held += opening[:1]
        trained = tuple(share for share in held if share.name not in frozen)
        unused = tuple(share for share in held if share.name in frozen)
        stages.append(StageParameters(first, end, is_last, trained, unused))
    return stages


def stage_borders(layers: Sequence[int], before: int, after: int, stages: int) -> list[int]:
    """Cut layers into stages of nearly the same weight: each border lies as near as it can to its even share.

    Args:
        layers: weight of each.
        before: weight that the first stage carries besides.
        after: weight that the last stage carries besides.
        stages: at most as many as layers; each gets at least one.

    Returns:
        The first layer of each stage, and the number of layers at the end.
    """
    if not 1 <= stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot be cut into {stages} stages")
    sums = [before + total for total in accumulate(layers, initial=0)]
    share = (sums[-1] + after) / stages
    borders = [0]
    for stage in range(1, stages):
        distances = [abs(total - stage * share) for total in sums]
        nearest = distances.index(min(distances))
        borders.append(min(max(nearest, borders[-1] + 1), len(layers) - (stages - stage)))
    return [*borders, len(layers)]


def layer_of(tensor: ParameterTensor) -> int | None:
    """Index of the decoder layer that a parameter belongs to; `None` for embeddings, final norm and head."""
    return _layer_index(tensor.name)


@cache
def _layer_index(name: str) -> int | None:
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _share(tensor: ParameterTensor, tensors: int, experts: int, vocabulary: bool, tied: bool) -> ParameterTensor:
    """One rank's part of a parameter."""
    if tensor.role == "expert":
        number, *matrix = tensor.shape
        return tensor._replace(shape=(-(-number // experts), *_divided(tensor, tuple(matrix), tensors)))
    if tensors == 1:
        return tensor
    if tensor.role == "head" or (tensor.role == "embedding" and tied and _is_vocabulary(tensor)):
        rows, width = tensor.shape
        return tensor._replace(shape=(-(-rows // tensors) if vocabulary else rows, width))
    return tensor._replace(shape=_divided(tensor, tensor.shape, tensors))


def _divided(tensor: ParameterTensor, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """A matrix or bias with the dimension divided that its kind divides."""
    parts = tensor.name.split(".")
    module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    if layer_of(tensor) is None or module not in _COLUMN | _ROW:
        return shape
    if module in _COLUMN:
        return (-(-shape[0] // ranks), *shape[1:])
    return shape if len(shape) == 1 else (shape[0], -(-shape[1] // ranks))


def _is_vocabulary(tensor: ParameterTensor) -> bool:
    return not re.search(r"wpe|embed_positions", tensor.name)


def _numel(tensors: Iterable[ParameterTensor]) -> int:
    return sum(tensor.numel for tensor in tensors)
