"""A JSON file as plain data with the line of every key, so that a problem in it can be pointed at."""

import json
import re
from pathlib import Path
from typing import Any

from cluster.errors import DocumentError, Problem
from cluster.strict_yaml import Document

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def read_json(path: Path, error_class: type[DocumentError]) -> Document:
    """Read a JSON file whose top level is an object.

    Returns:
        The document; `problems` lists keys that are set twice, which JSON allows and every reader resolves as it likes.

    Raises:
        DocumentError: of `error_class`; the file can't be read, is not JSON or holds no object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise error_class(str(path), [Problem(f"cannot be read: {error.strerror or error}")]) from error
    except json.JSONDecodeError as error:
        raise error_class(str(path), [Problem(f"is not JSON: {error.msg}", line=error.lineno)]) from error
    except (ValueError, RecursionError) as error:
        raise error_class(str(path), [Problem(f"is not JSON: {error}")]) from error
    if not isinstance(data, dict):
        raise error_class(str(path), [Problem("the top level must be an object", line=1)])
    document = Document(str(path), data)
    _note_lines(text, document)
    return document


def _note_lines(text: str, document: Document) -> None:
    """Walk the tokens of valid JSON and note each key's line by its dotted path."""
    places = [""]  # the path of each open object or array; the last item of `keys` is the key or index inside it
    keys: list[Any] = [None]
    previous = ""
    line, end = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", end, match.start())
        end = match.start()
        part = match.group()
        if part in "{[":
            places.append(_join(places[-1], keys[-1]))
            keys.append(0 if part == "[" else None)
        elif part in "}]":
            places.pop()
            keys.pop()
        elif part == "," and isinstance(keys[-1], int):
            keys[-1] += 1
        elif part.startswith('"') and previous in "{," and not isinstance(keys[-1], int):
            keys[-1] = json.loads(part)
            _note(_join(places[-1], keys[-1]), line, document)
        previous = part if part in "{}[],:" else " "


def _note(place: str, line: int, document: Document) -> None:
    if place in document.lines:
        message = f"is set twice, first on line {document.lines[place]}; keep one of the two"
        document.problems.append(Problem(message, place, line))
    else:
        document.lines[place] = line


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _join(place: str, key: Any) -> str:
    return place if key is None else f"{place}.{key}" if place else str(key)
