"""YAML as plain data, strictly: version 1.2, no tags, no duplicate keys, bounded size, and the line of every value.

Recipes and profiles are both read here. A document keeps what was found wrong while it was read, so that
`cluster.validation.validate` can report it together with what is wrong in the values.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from cluster.errors import DocumentError, Problem

MAX_BYTES = 1 << 20
"""Largest document that is read."""
_MAX_VALUES = 100_000  # counted after aliases are followed: a kilobyte of nested aliases can stand for gigabytes
_MAX_DEPTH = 64
_TAG_PREFIX = "tag:yaml.org,2002:"
_INTEGER_BASES = {"0x": 16, "0o": 8, "0b": 2}
_SYNTAX_HINTS = {
    "mapping values are not allowed here": "text that holds ': ' needs quotes",
    "found undefined alias": "text that begins with * needs quotes",
    "found character '\\t' that cannot start any token": "indent with spaces",
    "that cannot start any token": "text that begins with this character needs quotes",
    "found unexpected end of stream": "a quote is not closed",
    "but found another document": "one file holds one document; remove the line ---",
}


@dataclass
class Document:
    """A YAML document as plain data, with the place that each value came from.

    Attributes:
        source: the file, as errors name it.
        data: the values: mappings with text keys, lists, text, numbers, booleans and None.
        lines: 1-based line of each key and list item by its dotted path (`data.sources.0.files`).
        overrides: the text of the override that set a value, by the value's dotted path.
        problems: what was found wrong so far.
        unread: dotted paths of values that stand in for ones that could not be read; nothing more is said about them.
    """

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def problem(self, where: str, message: str) -> Problem:
        """Make the problem of a value: it carries the line, or the override, that the value came from."""
        place = where
        while True:
            if place in self.overrides:
                return Problem(f"{message} (override {self.overrides[place]})", where)
            if place in self.lines or not place:
                return Problem(message, where, self.lines.get(place))
            place = place.rpartition(".")[0]


def read_yaml(path: Path, error_class: type[DocumentError]) -> Document:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file; errors name it as it is written here.
        error_class: what is raised for a file that cannot be read or is no YAML.

    Returns:
        The document; `problems` lists duplicate keys, tags and the like, which do not hinder reading on.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise error_class(str(path), [Problem(f"cannot be read: {error.strerror or error}")]) from error
    if len(content) > MAX_BYTES:
        raise error_class(str(path), [Problem(f"is larger than {MAX_BYTES} bytes")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise error_class(str(path), [Problem("is not UTF-8 text", line=line)]) from error
    return parse_yaml(text, str(path), error_class)


def parse_yaml(text: str, source: str, error_class: type[DocumentError]) -> Document:
    """Read YAML text whose top level is a mapping; see `read_yaml`."""
    document = Document(source)
    try:
        node = _compose(text)
        if node is None:
            raise _NotYamlError("is empty; it must be a mapping (key: value)", None)
        data = _Builder(document).build(node, "", 0)
    except _NotYamlError as error:
        raise error_class(source, [*document.problems, Problem(error.message, line=error.line)]) from error
    if not isinstance(data, dict):
        problems = document.problems or [
            Problem("the top level must be a mapping (key: value)", line=node.start_mark.line + 1)
        ]
        raise error_class(source, problems)
    document.data = data
    return document


def parse_value(text: str) -> Any:
    """Read one YAML value, such as the right side of an override.

    Raises:
        ValueError: it is no plain YAML value; the text says why.
    """
    document = Document("")
    try:
        node = _compose(text)
        value = None if node is None else _Builder(document).build(node, "", 0)
    except _NotYamlError as error:
        raise ValueError(error.message) from error
    if document.problems:
        raise ValueError("; ".join(problem.message for problem in document.problems))
    return value


class _NotYamlError(Exception):
    """The text cannot be read on from here."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def _compose(text: str) -> Node | None:
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        hint = next((hint for start, hint in _SYNTAX_HINTS.items() if start in message), None)
        raise _NotYamlError(
            f"is not YAML: {message}{f'; {hint}' if hint else ''}", mark.line + 1 if mark else None
        ) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotYamlError(f"is not YAML: the character {text[error.position]!r} is not allowed", line) from error
    except RecursionError as error:
        raise _NotYamlError("is nested too deeply", None) from error
    except Exception as error:  # on some text the parser trips over itself: %YAML 1.3, or "\\Uffffffff"
        raise _NotYamlError(f"is not YAML: {error}", None) from error
    return node


class _Builder:
    """Turns YAML nodes into plain data, noting lines and problems in a document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0

    def build(self, node: Node, path: str, depth: int) -> Any:
        self._values += 1
        line = node.start_mark.line + 1
        if depth > _MAX_DEPTH:
            raise _NotYamlError(f"is nested more than {_MAX_DEPTH} levels deep", line)
        if self._values > _MAX_VALUES:
            raise _NotYamlError(f"holds more than {_MAX_VALUES} values", line)
        if isinstance(node, MappingNode) and node.tag == f"{_TAG_PREFIX}map":
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG_PREFIX}seq":
            return self._sequence(node, path, depth)
        try:
            if isinstance(node, ScalarNode):
                return _scalar(str(node.tag), node.value)
            raise ValueError(_unknown_tag(str(node.tag)))
        except ValueError as error:
            self._document.problems.append(Problem(str(error), path, line))
            self._document.unread.add(path)
            return None

    def _mapping(self, node: MappingNode, path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or key_node.tag != f"{_TAG_PREFIX}str":
                self._document.problems.append(Problem(_bad_key(key_node), path, line))
                continue
            place = f"{path}.{key}" if path else key
            if key in result:
                self._document.problems.append(
                    Problem(f"is set twice, first on line {first_lines[key]}; keep one of the two", place, line)
                )
                continue
            first_lines[key] = self._document.lines[place] = line
            result[key] = self.build(value_node, place, depth + 1)
        return result

    def _sequence(self, node: SequenceNode, path: str, depth: int) -> list[Any]:
        result = []
        for index, item in enumerate(node.value):
            place = f"{path}.{index}" if path else str(index)
            self._document.lines[place] = item.start_mark.line + 1
            result.append(self.build(item, place, depth + 1))
        return result


def _bad_key(node: Node) -> str:
    if node.tag == f"{_TAG_PREFIX}merge":
        return "<< merges mappings in YAML 1.1 only; write the keys out"
    shown = f" {node.value!r}" if isinstance(node, ScalarNode) else ""
    return f"a key must be text, and{shown or ' this one'} is not; put it in quotes"


def _unknown_tag(tag: str) -> str:
    return f"the tag {tag.replace(_TAG_PREFIX, '!!')} is refused: only plain values are read here"


def _scalar(tag: str, text: str) -> Any:
    """Resolve a scalar by the YAML 1.2 core schema; dates stay text.

    Raises:
        ValueError: it has a tag of its own, or is a number that JSON cannot hold.
    """
    match tag.removeprefix(_TAG_PREFIX):
        case "str" | "timestamp" | "value":
            return _text(text)
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int":
            return _integer(text)
        case "float":
            number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                raise ValueError(f"{text} is not a finite number")
            return number
        case "bool":
            raise ValueError(f"{text!r} is no boolean; write true or false")
        case _:
            raise ValueError(_unknown_tag(tag))


def _text(text: str) -> str:
    if "\0" in text:
        raise ValueError("text cannot hold the character \\0")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text cannot hold half a surrogate pair; write the whole character")
    return text


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    base = _INTEGER_BASES.get(digits[:2].lower(), 10)
    try:
        return sign * int(digits[2:] if base != 10 else digits, base)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is no whole number") from error
