"""Overrides of a recipe: `training.max_steps=100`, `data.sources.0.weight=2`, or a leaf alone, `max_steps=9`."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from cluster.errors import Problem
from cluster.strict_yaml import Document, parse_value
from cluster.validation import field_paths


class _OverrideError(ValueError):
    """An override cannot be applied; the text says why."""


def apply_overrides(document: Document, overrides: Sequence[str], model_class: type[BaseModel]) -> None:
    """Lay overrides over a document, in place and in order; those that cannot be applied are added to its problems.

    Values are read as YAML. Whether the keys exist and the values fit is for validation to say, which then names the
    override in place of a line.

    Args:
        document: a recipe as read from its file.
        overrides: `key.sub=value` each; a number in the key is an index into a list; a name without a dot that is no
            top-level field stands for the one field of that name.
        model_class: what the document will be validated against.
    """
    for text in overrides:
        try:
            _apply(document, text, model_class)
        except _OverrideError as error:
            document.problems.append(Problem(f"override {text}: {error}"))


def _apply(document: Document, text: str, model_class: type[BaseModel]) -> None:
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise _OverrideError("must be written key=value or key.sub=value")
    try:
        value = parse_value(written)
    except ValueError as error:
        raise _OverrideError(f"the value {error}; a value is YAML, such as 3, [a, b] or '\"**/*.py\"'") from error
    _set(document, _full_path(document, key, model_class), value, text)


def _full_path(document: Document, key: str, model_class: type[BaseModel]) -> str:
    if "." in key or key in model_class.model_fields:
        return key
    paths = list(field_paths(model_class))
    candidates = [path for path in paths if path.rpartition(".")[2] == key]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise _OverrideError(f"{key} stands in several sections; write {' or '.join(candidates)}")
    by_leaf = {path.rpartition(".")[2]: path for path in [*document.lines, *paths]}
    close = get_close_matches(key, by_leaf, n=1, cutoff=0.6)
    raise _OverrideError(f"unknown key{f'; did you mean {by_leaf[close[0]]}?' if close else ''}")


def _set(document: Document, path: str, value: Any, text: str) -> None:
    *parents, last = path.split(".")
    container: Any = document.data
    for depth, part in enumerate(parents, start=1):
        slot = _slot(container, part, ".".join(parents[: depth - 1]))
        if isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
            document.overrides[".".join(parents[:depth])] = text
        container = container[slot]
    container[_slot(container, last, ".".join(parents))] = value
    document.overrides[path] = text
    for place in [place for place in document.lines if place == path or place.startswith(f"{path}.")]:
        del document.lines[place]


def _slot(container: Any, part: str, path: str) -> str | int:
    """Say where in a container a part of a key leads."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise _OverrideError(f"{path} is {container!r} and has no keys; set {path} itself")
    if not part.isdecimal() or int(part) >= len(container):
        known = f"0 to {len(container) - 1}" if container else "none, it is empty"
        raise _OverrideError(f"{path} is a list, and {part!r} is not an index of it ({known})")
    return int(part)
