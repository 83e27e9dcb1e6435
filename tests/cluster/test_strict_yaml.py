"""What YAML is read, what is refused, and on which line."""

from pathlib import Path

import pytest

from cluster.errors import DocumentError
from cluster.strict_yaml import MAX_BYTES, parse_value, parse_yaml, read_yaml


def read(text: str):
    return parse_yaml(text, "file.yaml", DocumentError)


def refusal(text: str) -> str:
    with pytest.raises(DocumentError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("-7", -7),
        ("true", True),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("${env:HOME}/x", "${env:HOME}/x"),
    ],
)
def test_values_follow_the_yaml_1_2_core_schema(written, value):
    result = parse_value(written)
    assert result == value
    assert type(result) is type(value)


def test_lines_are_those_of_keys_and_items():
    document = read("a:\n  b: 1\n\n  c:\n    - x\n    # a comment\n    - d: 2\n")
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert document.lines == {"a": 1, "a.b": 2, "a.c": 4, "a.c.0": 5, "a.c.1": 7, "a.c.1.d": 7}


def test_a_problem_has_the_line_of_the_nearest_enclosing_value():
    document = read("a:\n  b:\n    - 1\n")
    assert document.problem("a.b.0.missing", "x").line == 3
    assert document.problem("nowhere", "x").line is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1, 2\n", "line 3  is not YAML: while parsing a flow sequence expected ',' or ']'"),
        (
            "a: 1\nb: c: d\n",
            "line 2  is not YAML: mapping values are not allowed here; text that holds ': ' needs quotes",
        ),
        ("a:\n\t- b\n", "found character '\\t' that cannot start any token; indent with spaces"),
        ("a: *.py\n", "line 1  is not YAML: found undefined alias '.py'; text that begins with * needs quotes"),
        (
            "a: 1\n---\nb: 2\n",
            "line 2  is not YAML: expected a single document in the stream but found another document",
        ),
        ("a: \x07\n", "line 1  is not YAML: the character '\\x07' is not allowed"),
        ("%YAML 1.3\n---\na: 1\n", "is not YAML: version minor part can only be 2 or 1"),
        ("%YAML 3.0\n---\na: 1\n", "line 1  is not YAML: found incompatible YAML document"),
        ('a: "\\Uffffffff"\n', "is not YAML: "),
        ("", "is empty; it must be a mapping"),
        ("# nothing\n", "is empty; it must be a mapping"),
        ("\n- a\n- b\n", "line 2  the top level must be a mapping"),
        ("[" * 1000, "is nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "line 1  is nested more than 64 levels deep"),
        ("a: &a [*a]\n", "is nested more than 64 levels deep"),
    ],
)
def test_text_that_is_no_yaml_mapping_is_refused_at_once(text, expected):
    message = refusal(text)
    assert message.startswith("file.yaml: 1 problem\n")
    assert expected in message


def test_aliases_cannot_multiply_without_bound():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "holds more than 100000 values" in refusal("\n".join(lines))


@pytest.mark.parametrize(
    ("line", "where", "expected"),
    [
        ("x: !!python/object/apply:os.system [echo]", "x", "the tag !!python/object/apply:os.system is refused"),
        ("x: !include other.yaml", "x", "the tag !include is refused"),
        ("x: !!binary aGk=", "x", "the tag !!binary is refused"),
        ("x: !!set {a, b}", "x", "the tag !!set is refused"),
        ("x: !!int abc", "x", "'abc' is no whole number"),
        ("x: !!bool maybe", "x", "'maybe' is no boolean; write true or false"),
        ("x: .inf", "x", ".inf is not a finite number"),
        ("x: -.inf", "x", "-.inf is not a finite number"),
        ("x: .nan", "x", ".nan is not a finite number"),
        ("x: 1e999", "x", "1e999 is not a finite number"),
        ('x: "a\\0b"', "x", "text cannot hold the character \\0"),
        ('x: "\\ud800"', "x", "text cannot hold half a surrogate pair"),
        ("1: x", "", "a key must be text, and '1' is not; put it in quotes"),
        ("true: x", "", "a key must be text, and 'true' is not"),
        ("? [a]\n: x", "", "a key must be text, and this one is not"),
        ("<<: {b: 1}", "", "<< merges mappings in YAML 1.1 only; write the keys out"),
        ("first: 2", "first", "is set twice, first on line 1; keep one of the two"),
    ],
)
def test_a_bad_value_is_a_problem_with_its_line_and_the_rest_is_read(line, where, expected):
    document = read(f"first: 1\n{line}\nlast: 3\n")
    assert document.data["first"] == 1
    assert document.data["last"] == 3
    (problem,) = document.problems
    assert (problem.where, problem.line) == (where, 2)
    assert problem.message.startswith(expected)


def test_no_directive_brings_back_yaml_1_1():
    document = read("%YAML 1.1\n---\na: yes\nb: 1:30\n")
    assert [problem.message for problem in document.problems] == [
        "'yes' is no boolean; write true or false",
        "'1:30' is no whole number",
    ]


def test_duplicate_keys_are_found_at_every_level():
    document = read("a:\n  b: 1\n  b: 2\nc:\n  - d: 1\n    d: 2\na: 3\n")
    assert [(problem.where, problem.line) for problem in document.problems] == [("a.b", 3), ("c.0.d", 6), ("a", 7)]


def test_a_file_that_cannot_be_read(tmp_path: Path):
    for path, expected in [
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ]:
        with pytest.raises(DocumentError, match=f"{path}: 1 problem\n  cannot be read: {expected}"):
            read_yaml(path, DocumentError)


def test_a_file_that_is_too_large_or_no_text(tmp_path: Path):
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(DocumentError, match=f"is larger than {MAX_BYTES} bytes"):
        read_yaml(large, DocumentError)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(DocumentError, match="line 2  is not UTF-8 text"):
        read_yaml(latin, DocumentError)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path):
    path = tmp_path / "bom.yaml"
    path.write_text("\ufeffa: 1\n", encoding="utf-8")
    assert read_yaml(path, DocumentError).data == {"a": 1}


@pytest.mark.parametrize("written", ["[1", "a: b: c", "!x y", ".inf", "*", "a: 1\na: 2"])
def test_a_value_that_is_no_plain_yaml_is_refused(written):
    with pytest.raises(ValueError, match=r"not YAML|refused|finite|twice"):
        parse_value(written)
