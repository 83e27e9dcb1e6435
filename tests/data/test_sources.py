import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.sources import is_held_out, locate_sources, open_documents, text_batches
from launcher.errors import DataError, SourceError
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
TEXTS = ["first\ndocument", "second", "naïve third", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same four documents in every form."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    rows = [{"number": index, "text": text} for index, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.csv").write_text('number,text\n0,"first\ndocument"\n1,second\n2,naïve third\n3,\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(folder / "saved")
    DatasetDict({"train": dataset, "tiny": dataset.select([1])}).save_to_disk(folder / "saved_splits")
    hub = folder / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text((folder / "rows.jsonl").read_text())
    return folder


def read(recipe: Recipe, scratch: Path) -> list[Any]:
    documents = []
    for index, located in enumerate(locate_sources(recipe, scratch / "cache")):
        own = scratch / str(index)
        own.mkdir(parents=True)
        for batch in text_batches(open_documents(located, own, recipe.name)):
            documents += batch
    return documents


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"type": "text", "files": ["{}/?.txt"]}, TEXTS),
        ({"type": "text", "files": ["{}/?.txt"], "exclude": ["**/[12].txt"]}, [TEXTS[0], ""]),
        ({"type": "text", "files": ["{}/?.txt"], "sample_by": "line"}, ["first", "document", "second", "naïve third"]),
        ({"type": "jsonl", "files": ["{}/rows.jsonl"]}, TEXTS),
        ({"type": "json", "files": ["{}/rows.json"]}, TEXTS),
        ({"type": "csv", "files": ["{}/rows.csv"]}, [*TEXTS[:3], None]),
        ({"type": "parquet", "files": ["{}/rows.parquet"]}, TEXTS),
        ({"type": "saved", "path": "{}/saved"}, TEXTS),
        ({"type": "saved", "path": "{}/saved_splits", "split": "tiny"}, TEXTS[1:2]),
        ({"type": "hub", "path": "{}/hub", "split": "train[:2]"}, TEXTS[:2]),
    ],
)
def test_documents_are_read_from_every_kind_of_source(
    folder: Path, tmp_path: Path, make_recipe: MakeRecipe, source: dict[str, Any], expected: list[str]
) -> None:
    filled = json.loads(json.dumps(source).replace("{}", str(folder)))
    assert read(make_recipe(sources=[filled]), tmp_path) == expected


def test_paragraphs_are_documents_too(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n\n\n\nthree")
    source = {"type": "text", "files": [f"{tmp_path}/a.txt"], "sample_by": "paragraph"}
    assert read(make_recipe(sources=[source]), tmp_path) == ["one\nstill one", "two", "three"]


def test_names_that_datasets_takes_for_patterns_are_read(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    odd = tmp_path / "a[1]"
    odd.mkdir()
    for name in ("what?.txt", "st*r.txt", "__init__.py", "a::b.txt", "README.md"):
        (odd / name).write_text(name)
    source = {"type": "text", "files": [f"{tmp_path}/a[[]1]/*"]}
    expected = ["README.md", "__init__.py", "a::b.txt", "st*r.txt", "what?.txt"]
    assert read(make_recipe(sources=[source]), tmp_path) == expected


def test_text_that_is_not_utf8_is_replaced_and_known(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("\ufeffwith a mark".encode())
    recipe = make_recipe(sources=[{"type": "text", "files": [f"{tmp_path}/*.txt"]}])
    (located,) = locate_sources(recipe, tmp_path / "cache")
    assert located.undecodable == [f"{tmp_path}/a.txt"]
    assert read(recipe, tmp_path) == ["na\ufffdve", "with a mark"]


def test_every_missing_source_is_named_with_its_field(folder: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (folder / "latin.jsonl").write_bytes('{"text": "naïve"}'.encode("latin-1"))
    recipe = make_recipe(
        sources=[
            {"type": "text", "files": [f"{folder}/*.none", f"{folder}/missing.txt"]},
            {"type": "parquet", "files": [f"{folder}/rows.parquet"]},
            {"type": "text", "files": [f"{folder}/*.txt"], "exclude": ["**/*.txt"]},
            {"type": "saved", "path": f"{folder}/nowhere"},
            {"type": "saved", "path": f"{folder}/saved_splits", "split": "test"},
            {"type": "jsonl", "files": [f"{folder}/latin.jsonl"]},
            {"type": "hub", "path": f"{folder}/nowhere"},
        ],
        validation_sources=[{"type": "csv", "files": [f"{folder}/missing.csv"]}],
    )
    with pytest.raises(SourceError) as caught:
        locate_sources(recipe, tmp_path / "cache")
    assert isinstance(caught.value, DataError)
    problems = [(problem.where, problem.message) for problem in caught.value.problems]
    assert problems[:-2] == [
        ("data.sources.0.files", f"{folder}/*.none matches no file"),
        ("data.sources.0.files", f"there is no file {folder}/missing.txt"),
        ("data.sources.2.files", "exclude leaves out all 4 matches"),
        ("data.sources.3.path", f"there is no folder {folder}/nowhere"),
        (
            "data.sources.4.path",
            f"{folder}/saved_splits/test was not written by Dataset.save_to_disk; it holds the splits tiny, train",
        ),
        ("data.sources.5.files", f"{folder}/latin.jsonl is not UTF-8; convert it, or leave it out with exclude"),
    ]
    assert problems[-2][0] == "data.sources.6.path"
    assert problems[-2][1].startswith(f"datasets cannot load {folder}/nowhere: ")
    assert problems[-1] == ("data.validation_sources.0.files", f"there is no file {folder}/missing.csv")


@pytest.mark.parametrize(
    ("source", "where", "message"),
    [
        (
            {"type": "jsonl", "text_column": "body"},
            ".text_column",
            "there is no column body; the columns are number, text",
        ),
        ({"type": "csv", "text_column": "number"}, ".text_column", r"column number holds Value\('int64'\), not text"),
        ({"type": "text", "text_column": "body"}, ".text_column", "there is no column body; the columns are text"),
        ({"type": "json", "text_column": "tags"}, ".text_column", "column tags holds List.*, not text"),
        ({"type": "broken"}, "", "datasets cannot load the files as jsonl: JSON parse error"),
        ({"type": "parquet"}, "", "datasets cannot load the files as parquet: Parquet magic bytes not found"),
    ],
)
def test_what_datasets_cannot_read_is_said_in_one_line(
    folder: Path, tmp_path: Path, make_recipe: MakeRecipe, source: dict[str, str], where: str, message: str
) -> None:
    files = {"jsonl": "rows.jsonl", "csv": "rows.csv", "text": "0.txt", "json": "tags.json", "parquet": "0.txt"}
    (folder / "tags.json").write_text('[{"text": "a", "tags": ["b"]}]')
    (folder / "broken.jsonl").write_text('{"text": "a"\n{"text": "b"}\n')
    name = files.get(source["type"], "broken.jsonl")
    kind = "jsonl" if source["type"] == "broken" else source["type"]
    recipe = make_recipe(sources=[{**source, "type": kind, "files": [f"{folder}/{name}"]}])
    with pytest.raises(SourceError, match=message) as caught:
        read(recipe, tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == f"data.sources.0{where}"
    assert "\n" not in problem.message


@given(st.binary(max_size=50), st.integers(0, 2**63 - 1))
def test_a_document_is_held_out_of_larger_shares_too(text: bytes, seed: int) -> None:
    sides = [is_held_out(text, seed, fraction) for fraction in (0.0, 0.01, 0.3, 0.99)]
    assert sides == sorted(sides)
    assert not sides[0]


def test_the_share_held_out_is_the_fraction_and_depends_on_the_seed() -> None:
    texts = [f"document {index}".encode() for index in range(20_000)]
    for seed in (0, 1):
        held_out = sum(is_held_out(text, seed, 0.1) for text in texts)
        assert abs(held_out - 2000) < 4 * 42.4  # four standard deviations of a binomial
    both = sum(is_held_out(text, 0, 0.1) and is_held_out(text, 1, 0.1) for text in texts)
    assert abs(both - 200) < 4 * 14.1
