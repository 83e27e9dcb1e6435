import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Prepend
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launcher.data.encoding import DocumentEncoder, map_in_order, pieces_of
from launcher.data.tokenizer import (
    SAMPLE_PIECE_CHARACTERS,
    TokenizerFacts,
    bounded_sample,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from launcher.errors import SourceError
from launcher.recipe.model_sections import TrainTokenizerSection
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
SECTION = TrainTokenizerSection(vocab_size=500)
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def texts(corpus: Path) -> list[str]:
    return [path.read_text() for path in sorted(corpus.glob("*.py"))]


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizerFacts]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_tokenizer(texts, SECTION, folder)


def save(tokenizer: Tokenizer, folder: Path, **special: str) -> str:
    """Write a tokenizer as transformers does."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def byte_level(texts: list[str], pre_tokenizer: object, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_a_trained_tokenizer_loads_in_transformers_and_loses_no_character(
    trained: tuple[Path, TokenizerFacts], texts: list[str]
) -> None:
    folder, facts = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == facts.vocab_size == 500
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == facts.eos_token_id == 0
    assert facts.prefix == ()
    assert facts.suffix == (0,)
    for text in [*texts, "  naïve — 日本語 \t\r\n\x00 🙂 "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_depends_on_the_set_of_documents_alone(
    trained: tuple[Path, TokenizerFacts], texts: list[str], tmp_path: Path
) -> None:
    expected = (trained[0] / "tokenizer.json").read_bytes()
    train_tokenizer(reversed(texts), SECTION, tmp_path / "reversed")
    assert (tmp_path / "reversed/tokenizer.json").read_bytes() == expected
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys; from pathlib import Path; from launcher.data.tokenizer import train_tokenizer; "
        "from launcher.recipe.model_sections import TrainTokenizerSection; folder = Path(sys.argv[1]); "
        "texts = json.loads((folder / 'texts.json').read_text()); "
        "train_tokenizer(texts, TrainTokenizerSection(vocab_size=500), folder)"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment, timeout=120)
    assert (tmp_path / "tokenizer.json").read_bytes() == expected


def test_a_sample_is_bounded_and_does_not_depend_on_the_order() -> None:
    documents = [f"document {i} " * 50 for i in range(200)]
    size = len(documents[150])
    chosen = list(bounded_sample(documents, 20 * size))
    assert 15 <= len(chosen) <= 25
    assert chosen == list(bounded_sample(documents[::-1], 20 * size))
    assert set(chosen) < set(documents)
    assert sorted(bounded_sample(documents, 10**9)) == sorted(documents)


def test_a_corpus_in_one_document_can_be_sampled() -> None:
    document = "".join(f"{i} ä\n" for i in range(300_000))
    chosen = list(bounded_sample([document], 2**20))
    assert 0 < sum(len(piece.encode()) for piece in chosen) <= 2**20
    assert all(len(piece) <= SAMPLE_PIECE_CHARACTERS and piece in document for piece in chosen)


def encode(folder: Path, facts: TokenizerFacts, documents: list[str | None]) -> list[list[int]]:
    encoded = DocumentEncoder(folder, facts, seed=0, validation_fraction=0.0)(documents)
    return [part.tolist() for part in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])]


def test_documents_get_the_tokens_that_transformers_gives_and_an_end(
    trained: tuple[Path, TokenizerFacts], texts: list[str]
) -> None:
    folder, facts = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert max(map(len, texts)) > 20_000  # several pieces
    assert encode(folder, facts, [*texts]) == [[*tokenizer(text)["input_ids"], 0] for text in texts]


def test_empty_documents_are_counted_and_left_out(trained: tuple[Path, TokenizerFacts]) -> None:
    encoded = DocumentEncoder(*trained, seed=0, validation_fraction=0.0)(["a", "", None, " \n\t", "b"])
    assert encoded.empty == 3
    assert len(encoded.lengths) == len(encoded.held_out) == 2
    assert encoded.text_bytes == 2
    nothing = DocumentEncoder(*trained, seed=0, validation_fraction=0.0)([None])
    assert nothing.tokens.tolist() == nothing.lengths.tolist() == nothing.held_out.tolist() == []


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_cutting_a_text_into_pieces_changes_no_token(
    pattern: str, texts: list[str], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
    pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern == "gpt2"
        else pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    tokenizer = byte_level(texts, pre_tokenizer, ["<end>"])
    name = save(tokenizer, tmp_path / "one", eos_token="<end>")
    facts = load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": name}), tmp_path / "two")
    assert facts.splits_words
    for text in texts:
        whole = tokenizer.encode(text).ids
        pieces = pieces_of(text, 100)
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in tokenizer.encode(piece).ids] == whole


def test_a_tokenizer_that_looks_at_the_beginning_of_a_text_gets_texts_whole(
    texts: list[str], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    tokenizers = {
        "prefix": byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=True), ["<end>"]),
        "sentencepiece": byte_level(texts, pre_tokenizers.Metaspace(), ["<end>"]),
        "normalized": byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<end>"]),
        "composed": byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<end>"]),
    }
    tokenizers["normalized"].normalizer = Prepend("_")
    tokenizers["composed"].normalizer = NFC()
    for kind, tokenizer in tokenizers.items():
        name = save(tokenizer, tmp_path / kind, eos_token="<end>")
        facts = load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": name}), tmp_path / f"{kind} saved")
        assert facts.splits_words == (kind == "composed")
        assert encode(tmp_path / kind, facts, [texts[1]]) == [[*tokenizer.encode(texts[1]).ids, facts.eos_token_id]]


def test_a_loaded_tokenizer_keeps_its_special_tokens_and_loses_its_limits(
    texts: list[str], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """As Llama's: a begin token from the post-processor. As sentence encoders': truncation and padding saved along."""
    tokenizer = byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    name = save(tokenizer, tmp_path / "one", bos_token="<s>", eos_token="</s>")
    limited = Tokenizer.from_file(f"{name}/tokenizer.json")
    limited.enable_truncation(8)
    limited.enable_padding(length=100)
    limited.save(f"{name}/tokenizer.json")
    facts = load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": name}), tmp_path / "two")
    assert facts.prefix == (0,)
    assert facts.suffix == (1,)
    assert facts.eos_token_id == 1
    expected = [[0, *tokenizer.encode(text, add_special_tokens=False).ids, 1] for text in texts]
    assert encode(tmp_path / "two", facts, [*texts]) == expected
    assert min(map(len, expected)) > 100


def test_an_end_that_the_tokenizer_sets_itself_is_not_doubled(
    texts: list[str], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    tokenizer = byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["</s>"])
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    name = save(tokenizer, tmp_path / "one", eos_token="</s>")
    facts = load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": name}), tmp_path / "two")
    assert facts.suffix == (0,)


def test_identity_is_the_content_of_the_tokenizers_files(
    trained: tuple[Path, TokenizerFacts], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    def identity(folder: Path) -> list[object]:
        return tokenizer_identity(make_recipe(tokenizer={"tokenizer_name_or_path": str(folder)}))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in trained[0].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "b/model.safetensors").write_bytes(b"weights are no part of it")
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    (tmp_path / "b/special_tokens_map.json").write_text("{}")
    assert identity(tmp_path / "a") != identity(tmp_path / "b")


def test_a_tokenizer_that_cannot_be_had_is_an_error_that_names_the_field(
    texts: list[str], tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in [
        ("nobody/nothing-at-all", "nobody/nothing-at-all is no folder here, and cannot be had from the hub"),
        ("/no/such/folder", "/no/such/folder is no folder here, and cannot be had from the hub"),
        (str(tmp_path), "holds no tokenizer files"),
    ]:
        with pytest.raises(SourceError, match=message) as caught:
            tokenizer_identity(make_recipe(tokenizer={"tokenizer_name_or_path": name}))
        assert caught.value.problems[0].where == "tokenizer.tokenizer_name_or_path"

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="transformers cannot load the tokenizer of"):
        load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": str(tmp_path / "broken")}), tmp_path / "out")
    endless = save(byte_level(texts[:1], pre_tokenizers.ByteLevel(), []), tmp_path / "endless")
    with pytest.raises(SourceError, match="has no end-of-text token"):
        load_tokenizer(make_recipe(tokenizer={"tokenizer_name_or_path": endless}), tmp_path / "out")


def test_map_in_order_reads_no_further_ahead_than_needed_and_ends_on_an_error() -> None:
    taken: list[int] = []

    def items() -> "list[int]":
        for item in range(1000):
            taken.append(item)
            yield item

    results = map_in_order(lambda item: item * item, items(), num_threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 5
    results.close()

    def fails(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item

    taken.clear()
    with pytest.raises(ValueError, match="seven"):
        list(map_in_order(fails, items(), num_threads=2))
    assert len(taken) < 20
    assert "TOKENIZERS_PARALLELISM" not in os.environ
