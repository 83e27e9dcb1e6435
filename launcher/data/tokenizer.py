"""The tokenizer: loaded as transformers loads it, or a byte-level BPE trained on the training documents."""

import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from cluster.errors import Problem
from launcher.errors import SourceError
from launcher.recipe.model_sections import TrainTokenizerSection
from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS

END_OF_TEXT = "<|endoftext|>"
"""The special token of every trained tokenizer: begin, end and padding."""
BEGIN, SEPARATOR, MASK = "<|cls|>", "<|sep|>", "<|mask|>"
"""Special tokens that a tokenizer gets besides when it is trained for a task of the BERT kind."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The plain form of ChatML."""
SAMPLE_PIECE_CHARACTERS = 1 << 18
TRAINER_VERSION = 1
"""Part of a trained tokenizer's identity; counts up when the same text would give other tokens."""
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "config.json",
)  # fmt: skip


class TokenizerFacts(BaseModel):
    """What packing needs to know of a tokenizer.

    Attributes:
        vocab_size: one more than the largest token id.
        eos_token_id: ends every document. Fills rows too: padding is never seen nor predicted, and a padding token may
            lie outside of the model's vocabulary.
        prefix: tokens that the tokenizer puts before a text, such as Llama's begin-of-text.
        suffix: what it puts after a text, the end-of-text token last in any case.
        splits_words: words are split before they are merged, so that a text in pieces gives the tokens of the whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    eos_token_id: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    splits_words: bool


def read_chat_template(recipe: Recipe) -> str:
    """Return the chat template that the recipe names.

    Raises:
        SourceError: there is no such file.
    """
    name = str(recipe.tokenizer.chat_template)
    if name == "chatml":
        return CHATML
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(f"cannot read {name} ({error}); name a file, or chatml", "tokenizer.chat_template")
        raise SourceError(recipe.name, [problem]) from error


def tokenizer_origin(recipe: Recipe) -> tuple[str, str]:
    """Return the folder or hub name that a tokenizer is loaded from, and the recipe's field that says so."""
    if recipe.tokenizer.tokenizer_name_or_path is not None:
        return recipe.tokenizer.tokenizer_name_or_path, "tokenizer.tokenizer_name_or_path"
    return recipe.model.model_name_or_path or "", "model.model_name_or_path"


def tokenizer_identity(recipe: Recipe) -> list[Any]:
    """Return what decides the tokens, apart from the documents; reads the tokenizer's files but loads nothing.

    Raises:
        SourceError: there is no such tokenizer.
    """
    if recipe.tokenizer.train is not None:
        identity = ["train", TRAINER_VERSION, recipe.tokenizer.train.model_dump()]
        return [*identity, "encoder"] if TASKS[recipe.task].encoder_tokens else identity
    folder = tokenizer_folder(recipe)
    files = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    if not any(path.name != "config.json" for path in files):
        name, field = tokenizer_origin(recipe)
        raise SourceError(recipe.name, [Problem(f"{name} holds no tokenizer files", field)])
    identity = ["load", [[path.name, xxh3_128_hexdigest(path.read_bytes())] for path in files]]
    return identity if recipe.tokenizer.pad_token is None else [*identity, recipe.tokenizer.pad_token]


def tokenizer_folder(recipe: Recipe) -> Path:
    """Return the folder of the tokenizer to load; one named on the hub is downloaded, unless it already is.

    Raises:
        SourceError: there is no such folder, and no such name on the hub.
    """
    name, field = tokenizer_origin(recipe)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_TOKENIZER_FILES)))
    except (OSError, HFValidationError) as error:  # every refusal of the hub is an OSError
        text = str(error).strip().splitlines()[0]
        raise SourceError(
            recipe.name, [Problem(f"{name} is no folder here, and cannot be had from the hub: {text}", field)]
        ) from error


def load_tokenizer(recipe: Recipe, directory: Path) -> TokenizerFacts:
    """Load the recipe's tokenizer as transformers does, and save it to `directory`.

    Raises:
        SourceError: transformers refuses it, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    name, field = tokenizer_origin(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(recipe))
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error).strip().splitlines()[0]
        problem = Problem(f"transformers cannot load the tokenizer of {name}: {text}", field)
        raise SourceError(recipe.name, [problem]) from error
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos is None:
        raise SourceError(recipe.name, [Problem(f"the tokenizer of {name} has no end-of-text token", field)])
    if not tokenizer.is_fast:
        raise SourceError(recipe.name, [Problem(f"the tokenizer of {name} has no tokenizer.json form", field)])
    pad = recipe.tokenizer.pad_token
    if pad is not None:
        if pad not in tokenizer.get_vocab():
            text = f"{pad!r} is no token of {name}; its special tokens are {', '.join(tokenizer.all_special_tokens)}"
            raise SourceError(recipe.name, [Problem(text, "tokenizer.pad_token")])
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(directory)
    return _facts(directory, eos)


def train_tokenizer(
    documents: Iterable[str], section: TrainTokenizerSection, directory: Path, encoder_tokens: bool = False
) -> TokenizerFacts:
    """Train a byte-level BPE (Radford et al. 2019; `tokenizers`) and save it as a Hugging Face folder.

    The result is a function of the set of documents: neither their order nor the number of threads plays a part.

    Args:
        documents: texts to learn from.
        section: size and limits.
        directory: to save to.
        encoder_tokens: add BERT's special tokens, and frame texts by them: begin, text, separator, second text and
            separator.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        special_tokens=[END_OF_TEXT, BEGIN, SEPARATOR, MASK] if encoder_tokens else [END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bounded_sample(documents, section.max_bytes), trainer)
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if encoder_tokens:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A {SEPARATOR}",
            pair=f"{BEGIN} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, SEPARATOR)],
        )
        names |= {"cls_token": BEGIN, "sep_token": SEPARATOR, "mask_token": MASK}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _facts(directory, eos=0)  # the trainer puts special tokens first


def bounded_sample(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Keep the pieces of text with the smallest hashes, as many as fit into `max_bytes`, in the order of their hashes.

    One pass, and never more than `max_bytes` of text (and one document) in memory. A document is cut into pieces of
    `SAMPLE_PIECE_CHARACTERS`, so that a corpus in one file can be sampled too.
    """
    kept: list[tuple[int, bytes]] = []  # a heap whose first element has the largest hash
    size = 0
    for document in documents:
        for start in range(0, len(document), SAMPLE_PIECE_CHARACTERS):
            piece = document[start : start + SAMPLE_PIECE_CHARACTERS].encode()
            heapq.heappush(kept, (-xxh3_64_intdigest(piece), piece))
            size += len(piece)
            while size > max_bytes:
                size -= len(heapq.heappop(kept)[1])
    for _, piece in sorted(kept, reverse=True):
        yield piece.decode()


def _facts(directory: Path, eos: int) -> TokenizerFacts:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    suffix = framed[start + len(plain) :]
    return TokenizerFacts(
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=eos,
        prefix=tuple(framed[:start]),
        suffix=tuple(suffix if suffix[-1:] == [eos] else [*suffix, eos]),
        splits_words=_splits_words(json.loads(tokenizer.to_str())),
    )


def _splits_words(definition: dict[str, Any]) -> bool:
    """Tell whether a line end after a letter always separates words, as in the patterns of GPT-2, Llama 3 and Qwen.

    A prefix space or a normaliser that looks at a text's beginning (SentencePiece) would show in every piece.
    """
    first = definition.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    patterns = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
    byte_levels = [part for part in parts if part.get("type") == "ByteLevel"]
    return (
        (definition.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
        and all(part.get("type") in ("Split", "Digits", "ByteLevel") for part in parts)
        and not any(part["add_prefix_space"] for part in byte_levels)
        and (any(part["use_regex"] for part in byte_levels) or any(r"\s+(?!\S)" in pattern for pattern in patterns))
    )
