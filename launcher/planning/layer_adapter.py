"""What LoRA and DoRA on some matrices of each layer keep for the backward pass, as peft 0.21 computes them."""

from dataclasses import dataclass

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Families for which a test of ours has compared what is kept under an adapter."""
ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj"})
MATRICES = ATTENTION_INPUTS | {"o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class MatrixWidths:
    """Elements of a token on each side of a layer's matrices.

    Attributes:
        hidden: of the residual stream.
        queries: of all query heads.
        keys: of all key heads.
        inner: of the MLP.
    """

    hidden: float
    queries: float
    keys: float
    inner: float

    def columns(self, matrix: str) -> float:
        """Elements that a matrix reads."""
        return {"o_proj": self.queries, "down_proj": self.inner}.get(matrix, self.hidden)

    def rows(self, matrix: str) -> float:
        """Elements that a matrix makes."""
        made = {"q_proj": self.queries, "gate_proj": self.inner, "up_proj": self.inner}
        return (made | {"k_proj": self.keys, "v_proj": self.keys}).get(matrix, self.hidden)


@dataclass(frozen=True)
class LayerAdapter:
    """LoRA (arXiv 2106.09685) on some matrices of each layer, with everything else frozen.

    A frozen matrix needs its input for nothing, and a frozen norm not what it has normalised, so that neither is kept.

    Attributes:
        rank: of the two matrices.
        targets: ends of the names of the matrices that they belong to, at least one of the attention's inputs.
        scaled: DoRA (arXiv 2402.09353), whose trained magnitudes scale the rows of the matrix and of its adapter.
        dropout: each pair has dropout of its own before it.
        head: the output head is trained besides, as a copy.
        embedding: the embedding is, so that the first layer's input needs a gradient.
    """

    rank: int
    targets: frozenset[str]
    scaled: bool = False
    dropout: bool = False
    head: bool = False
    embedding: bool = False

    def reads(self, *matrices: str) -> bool:
        """Whether what one of these matrices reads is kept as it is: the first of a pair needs it, or its dropout."""
        return not (self.dropout or self.targets.isdisjoint(matrices))

    @property
    def attention_masks(self) -> int:
        """Masks of dropout, a byte or an element for each of the residual stream, before the attention."""
        return len(self.targets & ATTENTION_INPUTS) if self.dropout else 0

    def kept(self, tokens: int, width: int, mask: int, widths: MatrixWidths) -> float:
        """Bytes of a layer, besides what it keeps without the adapter (`tuners/lora/layer.py`, `tuners/lora/dora.py`).

        Args:
            tokens: of a micro batch.
            width: bytes of an element.
            mask: bytes of an element of dropout's mask.
            widths: of the layer.
        """
        bytes_kept: float = tokens * width * self.rank * len(self.targets)  # what one of a pair hands to the other
        if self.dropout:  # its result and its mask
            bytes_kept += tokens * (width + mask) * sum(map(widths.columns, self.targets))
        if self.scaled:  # results of matrix and pair; norms, their quotient with the magnitudes, and it less one
            bytes_kept += (2 * tokens + 3) * width * sum(map(widths.rows, self.targets))
        return bytes_kept
