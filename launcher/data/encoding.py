"""Documents to tokens, on several threads.

Threads, because `tokenizers` leaves the interpreter lock while it encodes: measured on 2 cores, two threads halve the
time. What stays under the lock (cutting, and copying token ids to numpy) is about 40 ns a token, 4 % of the whole, so
some twenty cores can be kept busy.
"""

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from launcher.data.sources import is_held_out
from launcher.data.tokenizer import TokenizerFacts

SHORT_PIECE_CHARACTERS = 4_000
"""Where it changes no token, text goes in pieces of about this length: 1.4 to 1.7 times as fast on Python source."""
LONG_PIECE_CHARACTERS = 1 << 20
"""With any other tokenizer only a longer text is cut, because `tokenizers` needs some 100 bytes a token meanwhile."""
_CUT = re.compile(r"(?<=[^\W_])(?=\n)")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class EncodedDocuments:
    """Tokens of some documents, one after the other.

    Attributes:
        tokens: uint32 [sum of lengths]; each document begins with the tokenizer's prefix and ends with its suffix.
        lengths: int64 [documents], tokens of each, at least 1.
        held_out: bool [documents], true for those on the validation side.
        empty: documents left out because they hold nothing but white space.
        text_bytes: bytes of UTF-8 that were read.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    empty: int
    text_bytes: int


class DocumentEncoder:
    """Tokenises and assigns sides; may be called from several threads.

    Args:
        tokenizer_directory: holds `tokenizer.json`.
        facts: of that tokenizer.
        seed: of the split.
        validation_fraction: share of the documents that is held out.
    """

    def __init__(self, tokenizer_directory: Path, facts: TokenizerFacts, seed: int, validation_fraction: float) -> None:
        self.file = tokenizer_directory / "tokenizer.json"
        self.facts = facts
        self.seed = seed
        self.validation_fraction = validation_fraction
        self._own = threading.local()  # a tokenizer each, so that threads do not wait for one another's word cache

    def __call__(self, documents: list[str | None]) -> EncodedDocuments:
        """Encode documents in order."""
        texts = [text for text in documents if text and not text.isspace()]
        encoded = [text.encode() for text in texts]
        limit = SHORT_PIECE_CHARACTERS if self.facts.splits_words else LONG_PIECE_CHARACTERS
        pieces = [pieces_of(text, limit) for text in texts]
        encodings = iter(
            self._tokenizer().encode_batch([piece for some in pieces for piece in some], add_special_tokens=False)
        )
        parts: list[NDArray[np.uint32]] = []
        lengths = np.empty(len(texts), np.int64)
        prefix, suffix = (np.array(frame, np.uint32) for frame in (self.facts.prefix, self.facts.suffix))
        for index, some in enumerate(pieces):
            own = [prefix, *(np.array(next(encodings).ids, np.uint32) for _ in some), suffix]
            lengths[index] = sum(len(part) for part in own)
            parts += own
        held_out = [is_held_out(text, self.seed, self.validation_fraction) for text in encoded]
        return EncodedDocuments(
            tokens=np.concatenate(parts) if parts else np.empty(0, np.uint32),
            lengths=lengths,
            held_out=np.array(held_out, np.bool_),
            empty=len(documents) - len(texts),
            text_bytes=sum(map(len, encoded)),
        )

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if not hasattr(self._own, "tokenizer"):
            tokenizer = Tokenizer.from_file(str(self.file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._own.tokenizer = tokenizer
        return self._own.tokenizer


def pieces_of(text: str, limit: int) -> list[str]:
    """Cut a text before line ends that follow a letter or digit, into pieces of at least `limit` characters."""
    pieces, start = [], 0
    while len(text) - start > limit and (cut := _CUT.search(text, start + limit)):
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int) -> Iterator[_Result]:
    """Apply `function` on threads and yield results in order, reading `items` no further ahead than needed."""
    with _no_threads_inside(), ThreadPoolExecutor(num_threads, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_threads_inside() -> Iterator[None]:
    """Keep `tokenizers` from starting threads of its own for each call: the recipe's number is all there are."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
