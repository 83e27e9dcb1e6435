"""Which decoder layers each pipeline stage holds."""

from collections.abc import Mapping
from typing import Any, Literal

from launcher.planning.families import list_parameters
from launcher.planning.layout import Layout
from launcher.planning.model_shape import model_shape
from launcher.planning.sharding import layer_of, shard, stage_borders

Partition = Literal["parameters", "time"]


def pipeline_stages(
    config: Mapping[str, Any], layout: Layout, partition: Partition, sequence_length: int
) -> tuple[int, ...]:
    """Cut a model into stages of nearly equal parameters on each rank, or of nearly equal time.

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
    parameters = list_parameters(config)
    if partition == "parameters":
        return (0, *(stage.end_layer for stage in shard(parameters, layout)))
    shape = model_shape(config)
    if shape is None:
        raise ValueError(f"the family {config.get('model_type')} is not known")
    layers = [sequence_length * shape.num_attention_heads * shape.head_dim] * shape.num_hidden_layers
    head = 0
    for tensor in parameters:
        index = layer_of(tensor)
        if index is not None:
            layers[index] += tensor.numel
        elif tensor.role == "head" or shape.tie_word_embeddings:
            head += tensor.numel
    return tuple(stage_borders(layers, 0, head, layout.pipeline_parallel_size))
