"""Sections of a recipe about the model and its tokenizer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from launcher.recipe.section import Section


class ModelSection(Section):
    """Which model: pretrained weights, or a configuration to start from random weights."""

    model_name_or_path: str | None = None
    """Folder or hub name of pretrained weights."""
    config: dict[str, Any] | str | None = None
    """Train from random weights with this transformers configuration: a mapping with `model_type`, or the path of a
    `config.json`."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel, as in transformers; `sdpa` means `eager` for a family that has no `sdpa`."""
    kernels: Literal["torch", "auto"] = "torch"
    """`auto`: Liger's fused norms, rotary embeddings and MLPs on a GPU where the package `liger-kernel` is installed,
    and PyTorch's own elsewhere."""
    freeze: tuple[str, ...] = ()
    """Globs of parameters that are not trained, matched against their names (`*.embeddings.*`; `*`: all)."""
    unfreeze: tuple[str, ...] = ()
    """Globs of parameters that are trained all the same (`classifier.*`)."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("set exactly one of model_name_or_path (pretrained weights) and config (random weights)")
        if isinstance(self.config, dict) and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama, qwen3 or gpt2")
        return self


class TrainTokenizerSection(Section):
    """Train a byte-level BPE tokenizer on the training documents."""

    vocab_size: int = Field(ge=257, le=1_000_000)
    """Number of tokens, the 256 bytes and the special tokens included."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair must occur this often to be merged."""
    max_bytes: int = Field(default=2**27, ge=2**20)
    """Learn from at most so many bytes of text, picked by a hash of the text; more costs time and changes little."""


class TokenizerSection(Section):
    """Which tokenizer: the model's own (default), another one, or one trained from the data."""

    tokenizer_name_or_path: str | None = None
    """Folder or hub name; default: the model's."""
    train: TrainTokenizerSection | None = None
    """Train one from the training documents instead of loading one."""
    chat_template: str | None = None
    """A file with a Jinja template, or `chatml`; default: the loaded tokenizer's own."""
    pad_token: str | None = None
    """Which token of a loaded tokenizer pads, where it names none itself."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSection":
        if self.tokenizer_name_or_path is not None and self.train is not None:
            raise ValueError("set tokenizer_name_or_path or train, not both")
        return self
