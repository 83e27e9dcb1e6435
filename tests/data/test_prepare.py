import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from launcher.data.prepare import prepare
from launcher.data.sources import open_documents
from launcher.data.store import PreparedData, unigram_loss
from launcher.errors import SourceError, StorageError
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
LONG_AGO_NS = 1_000_000_000 * 10**9


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    """Put the documents of a split together again from their rows."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    texts: list[str] = []
    for dataset in prepared.split(split):
        stream: list[int] = []
        for index in range(len(dataset)):
            length = int(dataset.lengths[dataset.offsets[index] : dataset.offsets[index + 1]].sum())
            stream += dataset[index]["input_ids"][:length].tolist()
        ends = [i for i, token in enumerate(stream) if token == prepared.settings["eos_token_id"]]
        texts += [tokenizer.decode(stream[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]
        assert ends[-1] == len(stream) - 1
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_old(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def test_every_document_comes_back_whole_on_its_side(make_recipe: MakeRecipe, corpus: Path) -> None:
    prepared = prepare(make_recipe(validation_fraction=0.3), progress=False)
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    originals = {path.read_text() for path in corpus.glob("*.py")}
    assert len(train) + len(validation) == len(originals) == 13
    assert set(train) | set(validation) == originals
    assert prepared.statistics["validation"]["documents"] == len(validation) > 0
    assert prepared.statistics["train"]["documents"] == len(train) > 0


@pytest.mark.parametrize("packing", ["concat", "first_fit_decreasing", "none"])
def test_statistics_count_what_is_stored(make_recipe: MakeRecipe, packing: str, tmp_path: Path) -> None:
    write_old(tmp_path / "more/empty.txt", " \n")
    write_old(tmp_path / "more/one.txt", "One document more.")
    sources = [*make_recipe().data.model_dump()["sources"], {"type": "text", "files": [f"{tmp_path}/more/*"]}]
    prepared = prepare(make_recipe(packing=packing, sources=sources, sequence_length=128), progress=False)
    statistics = prepared.statistics
    assert [source["files"] for source in statistics["sources"]] == [13, 2]
    assert [source["empty_documents"] for source in statistics["sources"]] == [0, 1]
    assert [source["train"]["documents"] for source in statistics["sources"]] == [13, 1]
    first, second = prepared.split("train")
    assert len(first) + len(second) == statistics["train"]["sequences"]
    stored = int(first.lengths.sum()) + int(second.lengths.sum())
    assert stored == statistics["train"]["tokens"] == np.load(prepared.directory / "unigram_counts.npy").sum()
    assert statistics["train"]["utilization"] == stored / (128 * statistics["train"]["sequences"])
    assert (statistics["train"]["truncated_tokens"] > 0) == (packing == "none")
    assert any("1 empty documents were left out" in note for note in statistics["notes"])
    assert first.tokens.dtype == np.uint16
    assert statistics["validation"]["sequences"] == 0
    assert prepared.split("validation") == []


def test_a_second_call_does_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_old(tmp_path / "a.txt", "The same size and time.")
    recipe = make_recipe(sources=[{"type": "text", "files": [f"{tmp_path}/a.txt"]}])
    first = prepare(recipe, progress=False)
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    write_old(tmp_path / "a.txt", "THE SAME SIZE AND TIME.")  # which only reading the file could tell
    assert prepare(recipe, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")} == before


def test_the_fingerprint_follows_content_and_settings_and_no_path(
    make_recipe: MakeRecipe, tmp_path: Path, corpus: Path
) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(corpus, moved)
    here = prepare(make_recipe(), progress=False)
    there = prepare(make_recipe(sources=[{"type": "text", "files": [f"{moved}/*.py"], "weight": 3}]), progress=False)
    assert there == here
    (moved / "abc.py").write_text("# changed\n")
    changed = [
        make_recipe(sources=[{"type": "text", "files": [f"{moved}/*.py"]}]),
        make_recipe(sequence_length=32),
        make_recipe(packing="none"),
        make_recipe(cross_document_attention=True),
        make_recipe(validation_fraction=0.4),
        make_recipe(seed=1),
        make_recipe(tokenizer={"train": {"vocab_size": 401}}),
        make_recipe(tokenizer={"tokenizer_name_or_path": str(here.tokenizer_directory)}),
        make_recipe(sources=[{"type": "text", "files": [f"{corpus}/*.py"], "sample_by": "paragraph"}]),
    ]
    fingerprints = {prepare(recipe, progress=False).fingerprint for recipe in changed}
    assert len(fingerprints) == len(changed)
    assert here.fingerprint not in fingerprints


def test_the_result_does_not_depend_on_threads(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folders = []
    for threads in (1, 4):
        recipe = make_recipe(
            cache_directory=str(tmp_path / str(threads)), preprocessing_num_workers=threads, validation_fraction=0.3
        )
        folders.append(contents(prepare(recipe, progress=False).directory))
    assert folders[0] == folders[1]
    assert len(folders[0]) == 10  # three arrays for each of two splits, the tokenizer's two files, counts and marker


def test_the_side_of_a_document_does_not_depend_on_the_others(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    texts = [f"This is document {index}, and there is no other like it." for index in range(60)]
    tokenizer = {"train": {"vocab_size": 300}}
    sides = []
    for name, order in (
        ("forward", texts),
        ("backward", texts[::-1]),
        ("twice", texts + texts[:40]),
        ("few", texts[:50]),
    ):
        for index, text in enumerate(order):
            write_old(tmp_path / name / f"{index:03d}.txt", text)
        sources = [{"type": "text", "files": [f"{tmp_path / name}/*"]}]
        prepared = prepare(make_recipe(sources=sources, validation_fraction=0.25, tokenizer=tokenizer), progress=False)
        train, validation = set(documents_of(prepared, "train")), set(documents_of(prepared, "validation"))
        assert not train & validation
        sides.append(validation)
    assert sides[0] == sides[1] == sides[2]
    assert sides[3] == sides[0] & set(texts[:50])
    assert 0 < len(sides[0]) < 60


def test_the_tokenizer_is_trained_without_the_held_out_documents(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for index in range(40):
        write_old(tmp_path / f"{index:02d}.txt", f"{chr(0x4E00 + index) * 3} " * 20)
    sources = [{"type": "text", "files": [f"{tmp_path}/*.txt"]}]
    recipe = make_recipe(sources=sources, validation_fraction=0.3, tokenizer={"train": {"vocab_size": 1000}})
    prepared = prepare(recipe, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert validation
    assert max(len(tokenizer(text)["input_ids"]) for text in train) <= 30
    assert min(len(tokenizer(text)["input_ids"]) for text in validation) > 30
    assert any(note.startswith("tokenizer.train.vocab_size: the text gives") for note in prepared.statistics["notes"])


def test_validation_sources_are_held_out_as_a_whole(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_old(tmp_path / "a.txt", "Held out.")
    recipe = make_recipe(validation_sources=[{"type": "text", "files": [f"{tmp_path}/a.txt"]}])
    prepared = prepare(recipe, progress=False)
    assert documents_of(prepared, "validation") == ["Held out."]
    assert len(documents_of(prepared, "train")) == 13
    assert len(prepared.split("train")) == len(prepared.split("validation")) == 1


def test_the_unigram_baseline_is_that_of_the_stored_tokens(make_recipe: MakeRecipe) -> None:
    prepared = prepare(make_recipe(validation_fraction=0.3), progress=False)
    counts = np.ones(prepared.settings["vocab_size"])
    for dataset in prepared.split("train"):
        for sample, index in zip(dataset, range(len(dataset)), strict=True):
            length = int(dataset.lengths[dataset.offsets[index] : dataset.offsets[index + 1]].sum())
            np.add.at(counts, sample["input_ids"][:length], 1)
    labels = np.concatenate([sample["labels"][1:] for sample in prepared.split("validation")[0]])
    expected = -np.log(counts / counts.sum())[labels[labels != -100]].mean()
    assert unigram_loss(prepared, None) == pytest.approx(expected, rel=1e-12)
    assert 2 < expected < np.log(400)


def test_a_loaded_tokenizer_is_used_and_kept(make_recipe: MakeRecipe) -> None:
    trained = prepare(make_recipe(), progress=False)
    recipe = make_recipe(tokenizer={"tokenizer_name_or_path": str(trained.tokenizer_directory)})
    loaded = prepare(recipe, progress=False)
    assert np.array_equal(loaded.split("train")[0].tokens, trained.split("train")[0].tokens)
    assert AutoTokenizer.from_pretrained(loaded.tokenizer_directory).eos_token_id == loaded.settings["eos_token_id"]


@pytest.mark.parametrize(
    ("files", "options", "where", "message"),
    [
        ({"a": " ", "b": ""}, {}, "data.sources.0", "no document holds any text, nothing is left to train on"),
        (
            {"a": "one"}, {"validation_fraction": 1e-12}, "data.validation_fraction",
            "1e-12 of 1 documents holds out none; raise it",
        ),
        (
            {"a": "one"}, {"validation_fraction": 1 - 1e-12}, "data.sources.0",
            "all 1 documents are held out, nothing is left to train on",
        ),
        ({"a": "one", "b": ""}, {"validation": "b"}, "data.validation_sources", "no document holds any text"),
    ],
)  # fmt: skip
def test_splits_without_documents_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, files: dict[str, str], options: dict[str, Any], where: str, message: str
) -> None:
    for name, text in files.items():
        write_old(tmp_path / "texts" / name, text)
    if "validation" in options:
        held_out = tmp_path / "texts" / options["validation"]
        options = {"validation_sources": [{"type": "text", "files": [str(held_out)]}]}
    recipe = make_recipe(sources=[{"type": "text", "files": [f"{tmp_path}/texts/*"]}], **options)
    with pytest.raises(SourceError) as caught:
        prepare(recipe, progress=False)
    assert [(problem.where, problem.message) for problem in caught.value.problems] == [(where, message)]
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_vocabulary_smaller_than_the_tokens_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    largest = prepare(recipe, progress=False).settings["largest_token_id"]
    assert 300 < largest < 400
    config = {"model_type": "llama", "vocab_size": largest}
    small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    with pytest.raises(SourceError, match=f"vocab_size: {largest}, but the data holds token ids up to {largest}; set"):
        prepare(small, progress=False)


def test_a_weight_too_small_to_be_seen_is_refused_at_once(make_recipe: MakeRecipe) -> None:
    source = make_recipe().data.model_dump()["sources"][0]
    recipe = make_recipe(sources=[source, {**source, "weight": 1e-6}])
    with pytest.raises(SourceError, match=r"data.sources: weights 1, 1e-06: .* raise its weight or leave it out"):
        prepare(recipe, progress=False)


def test_a_cache_that_cannot_be_made_is_an_error_that_says_what_to_set(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = make_recipe(cache_directory=str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"Not a directory; name another folder with data\.cache_directory"):
        prepare(recipe, progress=False)


def test_the_cache_is_where_the_environment_says(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROFLEET_CACHE", str(tmp_path / "mine"))
    assert prepare(make_recipe(cache_directory=None), progress=False).directory.parent == tmp_path / "mine"
    monkeypatch.delenv("ZEROFLEET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = prepare(make_recipe(cache_directory=None), progress=False).directory
    assert directory.parent == tmp_path / "home/.cache/zerofleet"


def test_progress_is_plain_lines_without_a_terminal(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    prepare(recipe)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "reading data.sources.0", "training the tokenizer", "tokenising data.sources.0",
    ]  # fmt: skip
    assert all("13 documents" in line for line in lines)
    prepare(recipe)
    assert capsys.readouterr().err == ""
    prepare(make_recipe(seed=7), progress=False)
    assert capsys.readouterr().err == ""


def test_progress_is_bars_on_a_terminal(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, terminal = os.openpty()
    pieces: list[bytes] = []

    def look() -> None:
        with suppress(OSError):  # EIO: the terminal is closed
            while piece := os.read(master, 1 << 16):
                pieces.append(piece)

    looking = threading.Thread(target=look)
    looking.start()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        prepare(make_recipe())
    looking.join()
    os.close(master)
    shown = b"".join(pieces).decode()
    for stage in ("reading data.sources.0", "training the tokenizer", "tokenising data.sources.0"):
        assert stage in shown
    assert "13/13" in shown
    assert "\x1b[" in shown


def test_the_marker_says_what_was_made_without_time_or_place(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prepared = prepare(make_recipe(), progress=False)
    marker = json.loads((prepared.directory / "prepared.json").read_text())
    assert marker["settings"]["sequence_length"] == 64
    assert marker["settings"]["packing"] == "concat"
    assert str(tmp_path) not in json.dumps(marker)
    assert set(marker["files"]) == set(contents(prepared.directory)) - {"prepared.json"}


def test_files_that_are_not_utf8_are_counted_and_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.txt").write_bytes(f"naïve text number {index}".encode("latin-1"))
    (tmp_path / "fine.txt").write_text("naïve text")
    prepared = prepare(make_recipe(sources=[{"type": "text", "files": [f"{tmp_path}/*.txt"]}]), progress=False)
    (source,) = prepared.statistics["sources"]
    assert source["undecodable_files"] == 5
    shown = ", ".join(f"{tmp_path}/{index}.txt" for index in range(3))
    assert prepared.statistics["notes"][-1] == (
        f"data.sources.0: bytes that are not UTF-8 were replaced by U+FFFD in {shown} and 2 more"
    )
    assert "na\ufffdve text number 0" in documents_of(prepared, "train")


def test_a_file_that_changes_meanwhile_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old(tmp_path / "a.txt", "before")

    def write_then_open(*arguments: Any) -> Any:
        (tmp_path / "a.txt").write_text("after")
        return open_documents(*arguments)

    monkeypatch.setattr("launcher.data.prepare.open_documents", write_then_open)
    recipe = make_recipe(sources=[{"type": "text", "files": [f"{tmp_path}/a.txt"]}])
    with pytest.raises(SourceError, match=r"data\.sources\.0: .*a\.txt changed while it was prepared; try again"):
        prepare(recipe, progress=False)
    monkeypatch.undo()
    assert documents_of(prepare(recipe, progress=False), "train") == ["after"]
