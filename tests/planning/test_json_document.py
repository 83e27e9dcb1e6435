import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.planning.json_document import read_json


def write(folder: Path, text: str) -> Path:
    path = folder / "config.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_and_the_line_of_every_key(tmp_path: Path) -> None:
    text = '{\n "a": 1,\n\n "b": {"c": [1, {"d": "{,"}, "y"],\n  "e \\"f": null},\n "g": [], "h":\n {"i":\n true}\n}\n'
    document = read_json(write(tmp_path, text), RecipeError)
    assert document.data == {"a": 1, "b": {"c": [1, {"d": "{,"}, "y"], 'e "f': None}, "g": [], "h": {"i": True}}
    assert document.lines == {
        "a": 2,
        "b": 4,
        "b.c": 4,
        "b.c.1.d": 4,
        'b.e "f': 5,
        "g": 6,
        "h": 6,
        "h.i": 7,
    }
    assert document.problems == []


def test_a_key_that_is_set_twice_is_a_problem_with_both_lines(tmp_path: Path) -> None:
    document = read_json(write(tmp_path, '{\n"a": 1,\n"b": 2,\n"a": 3}'), RecipeError)
    assert [str(problem) for problem in document.problems] == [
        "line 4  a: is set twice, first on line 2; keep one of the two"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n}', "line 2|3  is not JSON"),
        ("[1]", "line 1  the top level must be an object"),
        ('{"a": NaN}', "is not JSON: NaN is no number in JSON"),
        ("[" * 200_000, "is not JSON"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_json(write(tmp_path, text), RecipeError)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("gone.json: 1 problem\n  cannot be read: No such file")):
        read_json(tmp_path / "gone.json", RecipeError)


def places(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        found = []
        for key, item in value.items():
            place = f"{prefix}.{key}" if prefix else key
            found += [place, *places(item, place)]
        return found
    if isinstance(value, list):
        return [
            place
            for index, item in enumerate(value)
            for place in places(item, f"{prefix}.{index}" if prefix else str(index))
        ]
    return []


KEYS = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda key: not key.isdigit()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.dictionaries(KEYS, VALUES, max_size=4), indent=st.sampled_from([None, 2]))
def test_any_json_object_is_read_as_json_does_and_every_key_has_its_line(
    tmp_path: Path, data: dict[str, Any], indent: int | None
) -> None:
    text = json.dumps(data, indent=indent)
    document = read_json(write(tmp_path, text), RecipeError)
    assert document.data == data
    assert list(document.lines) == places(data)
    for place, line in document.lines.items():
        assert json.dumps(place.rpartition(".")[2]) in text.split("\n")[line - 1]
