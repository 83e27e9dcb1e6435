"""Shape and parameter count of a model, from its transformers config alone."""

from pydantic import BaseModel, ConfigDict


class ModelShape(BaseModel):
    """What the planner knows of a model.

    Attributes:
        model_type: transformers' family name.
        num_parameters: trainable parameters, tied weights counted once.
        num_parameters_non_embedding: without token and position embeddings and the output head.
        max_position_embeddings: longest sequence, `None` when the family has no such bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int | None
    tie_word_embeddings: bool
    num_parameters: int
    num_parameters_non_embedding: int
