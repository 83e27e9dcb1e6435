"""Which keys the pinned DeepSpeed knows, and of what type their values are.

DeepSpeed itself ignores a misspelt key at the top level and in the sections that it reads key by key. The list in
`deepspeed_keys.json` is generated from the installed DeepSpeed (tests/planning/generate_deepspeed_keys.py); a test
compares it.
"""

import json
import operator
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from cluster.validation import near_match

AUTO = "auto"
"""Value of a key that is left to the recipe, or to DeepSpeed's default where the recipe does not own it."""

_BOUNDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "object": "an object",
    "null": "null",
}


@cache
def known_keys() -> dict[str, Any]:
    """Content of `deepspeed_keys.json`: `deepspeed` (version), `keys`, `renamed` and `removed`."""
    content: dict[str, Any] = json.loads(
        files("launcher.planning").joinpath("deepspeed_keys.json").read_text(encoding="utf-8")
    )
    return content


def key_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find every key that the pinned DeepSpeed does not take, and every value of a wrong type.

    Yields:
        (dotted path of the key, what is wrong and what to write instead).
    """
    yield from _section_problems(config, known_keys()["keys"], "")


def _section_problems(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        path = f"{prefix}{key}"
        spec = known.get(key)
        if spec is None:
            yield path, _unknown(path, key, known)
        elif isinstance(spec, dict):
            if isinstance(value, dict):
                yield from _section_problems(value, spec, f"{path}.")
            elif value != AUTO:
                yield path, f"must be an object, not {json.dumps(value)}"
        elif value != AUTO and (expected := _mismatch(value, spec)):
            yield path, f"is {json.dumps(value)}, but must be {expected}"


def _unknown(path: str, key: str, known: Mapping[str, Any]) -> str:
    content = known_keys()
    version = f"DeepSpeed {content['deepspeed']}"
    if path in content["removed"]:
        return f"{version} refuses it: {content['removed'][path].strip()}"
    if path in content["renamed"]:
        return f"is deprecated in {version}; use {content['renamed'][path]}"
    hint = near_match(key, list(known))
    elsewhere = [place for place in _paths(content["keys"], "") if place.rpartition(".")[2] == key]
    if elsewhere:
        hint = f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"{version} does not know this key" + (f"; {hint}" if hint else "")


def _paths(known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, spec in known.items():
        yield f"{prefix}{key}"
        if isinstance(spec, dict):
            yield from _paths(spec, f"{prefix}{key}.")


def _mismatch(value: Any, spec: str | list[Any]) -> str | None:
    """What a value should have been; `None` when it is right."""
    if isinstance(spec, list):
        fits = any(type(value) is type(item) and value == item for item in spec)
        return None if fits else f"one of {', '.join(json.dumps(item) for item in spec)}"
    kinds, *bounds = spec.split(" ")
    if kinds == "any":
        return None
    allowed = kinds.split("|")
    signs = list(zip(bounds[::2], bounds[1::2], strict=True))
    if any(_is_kind(value, kind) for kind in allowed) and (
        value is None or all(_BOUNDS[sign](value, float(bound)) for sign, bound in signs)
    ):
        return None
    return " or ".join(_KINDS[kind] for kind in allowed) + "".join(f" {sign} {bound}" for sign, bound in signs)


def _is_kind(value: Any, kind: str) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":  # 5e8 is a float to JSON, and a whole number to DeepSpeed
            return type(value) is int or (type(value) is float and value.is_integer())
        case "float":
            return type(value) in (int, float)
        case "str":
            return isinstance(value, str)
        case "list":
            return isinstance(value, list | tuple)
        case "object":
            return isinstance(value, dict)
        case _:
            return value is None
