"""Sequences of different lengths to one tensor."""

from collections.abc import Sequence
from typing import Any

import torch

from launcher.data.examples import EncodingError
from launcher.tasks.base import Batch, Sample


def pad(samples: Sequence[Sample], name: str, filler: int, *, mask: str = "attention_mask") -> Batch:
    """Pad one ragged field of some samples on the right to the longest.

    Returns:
        `name` and `mask` (1 where there is content), int64 [samples, longest]; at least one position.
    """
    rows = [torch.from_numpy(sample[name].astype("int64")) for sample in samples]
    longest = max(1, *(len(row) for row in rows))
    values = torch.full((len(rows), longest), filler, dtype=torch.int64)
    present = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
        present[index, : len(row)] = 1
    return {name: values, mask: present}


def padding_token(tokenizer: Any) -> int:
    """Id of a tokenizer's padding token.

    Raises:
        EncodingError: it has none.
    """
    if tokenizer.pad_token_id is None:
        known = ", ".join(tokenizer.all_special_tokens) or "none"
        raise EncodingError(
            f"the tokenizer has no padding token; name one of its special tokens ({known})", "tokenizer.pad_token"
        )
    return int(tokenizer.pad_token_id)


def mask_token(tokenizer: Any) -> int:
    """Id of a tokenizer's mask token.

    Raises:
        EncodingError: it has none.
    """
    if tokenizer.mask_token_id is None:
        raise EncodingError(
            "the tokenizer has no mask token, so nothing can be masked; take one that was made for masked language "
            "models, or train one",
            "tokenizer",
        )
    return int(tokenizer.mask_token_id)
