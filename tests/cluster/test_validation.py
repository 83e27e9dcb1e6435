"""Every kind of problem in its words, with path and line; on a model made for it."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import DocumentError
from cluster.strict_yaml import parse_yaml
from cluster.validation import field_paths, locate, near_match, validate


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Cat(Strict):
    kind: Literal["cat"]
    lives: int = 9
    cat: int = 0


class Fish(Strict):
    kind: Literal["fish", "shark"]
    length: float


Animal = Annotated[Cat | Fish, Field(discriminator="kind")]


class Inner(Strict):
    count: int = Field(default=1, ge=1, lt=10)
    ratio: float = Field(default=0.5, gt=0, le=1)
    on: bool = False
    needed: str
    """What is needed."""

    @model_validator(mode="after")
    def _no_pair(self) -> "Inner":
        if self.count == 2 and self.on:
            raise ValueError("count 2 and on do not go together; turn on off")
        return self


class Outer(Strict):
    inner: Inner = Inner(needed="x")
    animals: Annotated[tuple[Animal, ...], Field(min_length=1)] = (Cat(kind="cat"),)
    animal: Animal = Cat(kind="cat")
    either: dict[str, Any] | str | None = None
    size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    short: Annotated[str, Field(max_length=3, pattern=r"^[a-z]*$")] = ""
    table: dict[Annotated[str, Field(pattern=r"^[A-Z]+$")], int] = Field(default_factory=dict)


def check(text: str) -> Outer:
    return validate(Outer, parse_yaml(text, "f.yaml", DocumentError), DocumentError)


def problems(text: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(DocumentError) as caught:
        check(text)
    return [(problem.line, problem.where, problem.message) for problem in caught.value.problems]


def test_what_strict_reading_allows():
    outer = check("inner: {ratio: 1, needed: x}\nanimals: [{kind: shark, length: 2}]\nsize: 3\nnames: [a]\n")
    assert outer.inner.ratio == 1.0
    assert isinstance(outer.inner.ratio, float)
    assert outer.animals == (Fish(kind="shark", length=2.0),)
    assert outer.size == 3
    assert outer.names == ("a",)


@pytest.mark.parametrize(
    ("line", "where", "message"),
    [
        ("inner: {needed: x, count: true}", "inner.count", "must be a whole number, not true"),
        ("inner: {needed: x, count: '3'}", "inner.count", "must be a whole number, not '3'; write it without quotes"),
        ("inner: {needed: x, count: 3.0}", "inner.count", "must be a whole number, not 3.0"),
        ("inner: {needed: x, count: 0}", "inner.count", "is 0, but must be at least 1"),
        ("inner: {needed: x, count: 10}", "inner.count", "is 10, but must be less than 10"),
        ("inner: {needed: x, ratio: 0}", "inner.ratio", "is 0, but must be greater than 0"),
        ("inner: {needed: x, ratio: 2}", "inner.ratio", "is 2, but must be at most 1"),
        ("inner: {needed: x, ratio: half}", "inner.ratio", "must be a number, not 'half'"),
        (
            "inner: {needed: x, on: yes}",
            "inner.on",
            "must be true or false, not 'yes'; yes, no, on and off are text in YAML 1.2",
        ),
        ("inner: {needed: x, on: 1}", "inner.on", "must be true or false, not 1"),
        ("inner: {needed: 3}", "inner.needed", "must be text, not 3; put it in quotes"),
        ("inner: {}", "inner.needed", "is missing: What is needed."),
        ("inner:", "inner", "must be a mapping (key: value), not null; remove the key, or give it a value"),
        ("inner: 3", "inner", "must be a mapping (key: value), not 3"),
        ("inner: {needed: x, count: 2, on: true}", "inner", "count 2 and on do not go together; turn on off"),
        ("inner: {needed: x, conut: 2}", "inner.conut", "unknown key; did you mean count?"),
        ("inner: {needed: x, zzz: 2}", "inner.zzz", "unknown key; known here: count, ratio, on, needed"),
        ("ratio: 2", "ratio", "unknown key; did you mean inner.ratio?"),
        ("animals: []", "animals", "needs at least 1 item"),
        ("animals: [{kind: dog}]", "animals.0.kind", "is 'dog', but must be one of cat, fish, shark"),
        (
            "animals: [{kind: sharc}]",
            "animals.0.kind",
            "is 'sharc', but must be one of cat, fish, shark; did you mean shark?",
        ),
        ("animals: [{lives: 2}]", "animals.0.kind", "is missing: one of cat, fish, shark"),
        ("animals: [{kind: cat, lives: x}]", "animals.0.lives", "must be a whole number, not 'x'"),
        ("animals: [{kind: cat, cat: x}]", "animals.0.cat", "must be a whole number, not 'x'"),
        ("animals: [{kind: cat, live: 1}]", "animals.0.live", "unknown key; did you mean lives?"),
        ("animals: [{kind: fish}]", "animals.0.length", "is missing"),
        ("animals: [3]", "animals.0", "must be a mapping (key: value), not 3"),
        ("animal: {kind: fsh}", "animal.kind", "is 'fsh', but must be one of cat, fish, shark; did you mean fish?"),
        ("animal: {kind: fish, length: x}", "animal.length", "must be a number, not 'x'"),
        ("either: [1]", "either", "must be a mapping (key: value) or text, not a list"),
        ("size: atuo", "size", "must be a whole number or auto, not 'atuo'"),
        ("size: 0", "size", "is 0, but must be at least 1"),
        ("names: a.txt", "names", "must be a list, not 'a.txt'; write it as ['a.txt']"),
        ("names: [a, 3]", "names.1", "must be text, not 3; put it in quotes"),
        ("short: abcd", "short", "is longer than 3 characters"),
        ("short: A", "short", "is 'A', but must match ^[a-z]*$"),
        ("table: {a: 1}", "table.a", "is 'a', but must match ^[A-Z]+$"),
        ("table: {A: x}", "table.A", "must be a whole number, not 'x'"),
    ],
)
def test_one_problem_in_its_words(line, where, message):
    assert problems(f"# first line\n{line}\n") == [(2, where, message)]


def test_all_problems_at_once_in_the_order_of_the_file():
    text = "inner:\n  count: x\n  needed: 1\n\nanimals:\n  - kind: cat\n  - kind: dog\nsize: 0\nsize: 1\nwrong: 1\n"
    assert [(line, where) for line, where, _ in problems(text)] == [
        (2, "inner.count"),
        (3, "inner.needed"),
        (7, "animals.1.kind"),
        (8, "size"),
        (9, "size"),
        (10, "wrong"),
    ]


def test_what_reading_found_is_not_reported_a_second_time():
    assert problems("inner: {needed: !x 1}\n") == [
        (1, "inner.needed", "the tag !x is refused: only plain values are read here")
    ]


def test_reading_problems_alone_refuse_a_document_that_would_validate():
    assert problems("short: a\nshort: b\n") == [(2, "short", "is set twice, first on line 1; keep one of the two")]


def test_long_values_are_cut_short():
    ((_, _, message),) = problems(f"inner: {{needed: x, count: {'a' * 500}}}\n")
    assert len(message) < 120


def test_near_match_lists_the_known_words_only_when_they_are_few():
    assert near_match("lerning_rate", ["learning_rate", "x"]) == "did you mean learning_rate?"
    assert near_match("q", ["a", "b"]) == "known here: a, b"
    assert near_match("q", [f"word{i}" for i in range(30)]) == ""


def test_field_paths_walk_sections_and_stop_at_lists():
    paths = list(field_paths(Outer))
    assert paths[:5] == ["inner", "inner.count", "inner.ratio", "inner.on", "inner.needed"]
    assert "animals" in paths
    assert "animals.kind" not in paths


def test_a_key_called_like_a_tag_is_told_from_the_tag():
    assert locate(Outer, ("animals", 0, "cat", "cat")).where == "animals.0.cat"
    assert locate(Outer, ("animals", 0, "cat")).where == "animals.0"
    assert locate(Outer, ("either", "dict[str,any]", "a", "b")).where == "either.a.b"
