"""Which decoder layers each pipeline stage holds."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from launcher.planning.families import list_parameters
from launcher.planning.layout import Layout
from launcher.planning.model_shape import model_shape

Partition = Literal["parameters", "time"]


def pipeline_stages(
    config: Mapping[str, Any], layout: Layout, partition: Partition, sequence_length: int
) -> tuple[int, ...]:
    """Cut a model into stages of nearly equal parameters, or of nearly equal time.

    Time is counted in multiplications: a matrix makes one for each of its elements and each token, attention
    `sequence_length x heads x head size` for each token (scores and values, half of them masked), an embedding none.

    Args:
        config: of transformers, of a family that `list_parameters` knows.
        layout: sizes of the groups; at most as many stages as there are layers.
        partition: what is made equal.
        sequence_length: in tokens.

    Returns:
        The first decoder layer of each stage, and the number of layers at the end.
    """
    shape = model_shape(config)
    if shape is None:
        raise ValueError(f"the family {config.get('model_type')} is not known")
    layers = [0] * shape.num_hidden_layers
    embedding = head = 0
    for tensor in list_parameters(config):
        index = _layer_index(tensor.name)
        if index is not None:
            layers[index] += tensor.numel
        elif tensor.role == "embedding":
            embedding += tensor.numel
        else:
            head += tensor.numel
    stages, ranks, tied = layout.pipeline_parallel_size, layout.tensor_parallel_size, shape.tie_word_embeddings
    after = head + embedding * tied
    if partition == "time":
        attention = sequence_length * shape.num_attention_heads * shape.head_dim
        return tuple(stage_borders([size + attention for size in layers], 0, after, stages))
    # Tensor-parallel ranks share the layers and the head, and an embedding only where it is the head as well.
    return tuple(stage_borders(layers, embedding if tied else embedding * ranks, after, stages))


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


def _layer_index(name: str) -> int | None:
    _, found, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if found else None
