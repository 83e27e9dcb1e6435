"""Check a document against a pydantic model: every problem at once, each with its field, its line and a near match."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cluster.errors import DocumentError, Problem
from cluster.strict_yaml import Document

ModelType = TypeVar("ModelType", bound=BaseModel)

_MAX_LISTED = 20
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of sensible size",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
}
_BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def validate(model_class: type[ModelType], document: Document, error_class: type[DocumentError]) -> ModelType:
    """Make a model from a document.

    Strict as JSON is: `true` and `"3"` are no whole numbers; but a whole number is a number, and a list makes a tuple.

    Raises:
        DocumentError: of `error_class`, with everything that is wrong: what reading found and what the model refuses.
    """
    try:
        model = model_class.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        problems = [
            problem
            for problem in _problems(model_class, document, error.errors(include_url=False))
            if problem.where not in document.unread
        ]
        raise error_class(document.source, [*document.problems, *problems]) from error
    if document.problems:
        raise error_class(document.source, document.problems)
    return model


def near_match(word: str, known: Sequence[str]) -> str:
    """Say which of the known words was probably meant, or list them when they are few; empty when neither helps."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}" if 0 < len(known) <= _MAX_LISTED else ""


def field_paths(model_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Walk the dotted paths of all fields outside lists, sections before what they hold."""
    for name, info in model_class.model_fields.items():
        yield f"{prefix}{name}"
        for choice in _choices(_unwrap(_annotation(info))[0]):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                yield from field_paths(choice, f"{prefix}{name}.")


@dataclass(frozen=True)
class Place:
    """A place inside a model, and what may stand there.

    Attributes:
        path: the parts of the field's path as the document spells it.
        annotation: the type of the value; `Any` below free mappings and where the model has no such place.
        owner: the model that holds the field; `None` outside models.
        in_union: the annotation is one of several that the field allows.
    """

    path: tuple[str, ...]
    annotation: Any
    owner: type[BaseModel] | None = None
    in_union: bool = False

    @property
    def where(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


def locate(model_class: type[BaseModel], location: Sequence[str | int]) -> Place:
    """Find a place by pydantic's location.

    A location also names the chosen branch of a union (the tag, or the type); no document spells those, so they are
    left out of the path. That is decided by the types and not by the data, where a key can be called like a tag.
    """
    path: list[str] = []
    annotation: Any = model_class
    owner: type[BaseModel] | None = None
    in_union = False
    for part in location:
        base, discriminator = _unwrap(annotation)
        choices = _choices(base)
        if discriminator is not None or len(choices) > 1:
            annotation, in_union = _branch(choices, discriminator, str(part)), discriminator is None
            continue
        if part == "[key]":  # pydantic marks a mapping's key this way, after the key itself
            continue
        path.append(str(part))
        annotation, owner = _step(choices[0], part)
        in_union = False
    return Place(tuple(path), annotation, owner, in_union)


def _step(annotation: Any, part: str | int) -> tuple[Any, type[BaseModel] | None]:
    if _is_model(annotation):
        info = annotation.model_fields.get(str(part))
        return (Any if info is None else _annotation(info)), annotation
    arguments = get_args(annotation)
    if get_origin(annotation) in (tuple, list) and arguments:
        return arguments[0], None
    if get_origin(annotation) is dict:
        return arguments[1], None
    return Any, None


def _branch(choices: Sequence[Any], discriminator: str | None, label: str) -> Any:
    for choice in choices:
        if discriminator is not None:
            if label in _literals(_annotation(choice.model_fields[discriminator])):
                return choice
            continue
        base, _ = _unwrap(choice)
        name = str(getattr(get_origin(base) or base, "__name__", "")).lower()
        if label.lower().removeprefix("constrained-").startswith(name):
            return base
    return Any


def _annotation(info: FieldInfo) -> Any:
    return Annotated[info.annotation, info] if info.discriminator else info.annotation


def _unwrap(annotation: Any) -> tuple[Any, str | None]:
    if get_origin(annotation) is not Annotated:
        return annotation, None
    base, *metadata = get_args(annotation)
    names = [item.discriminator for item in metadata if isinstance(getattr(item, "discriminator", None), str)]
    return base, names[0] if names else None


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [choice for choice in get_args(annotation) if choice is not NoneType]
    return [annotation]


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for choice in _choices(_unwrap(annotation)[0])
        if get_origin(choice) is Literal
        for value in get_args(choice)
    ]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _problems(model_class: type[BaseModel], document: Document, errors: Sequence[ErrorDetails]) -> list[Problem]:
    kinds: dict[str, list[str]] = {}
    inputs: dict[str, Any] = {}
    messages: dict[str, list[str]] = {}
    for error in errors:
        if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # pydantic counts the valid items only, and the others have problems of their own
        place = locate(model_class, error["loc"])
        if kind := _expected_kind(place, error):
            kinds.setdefault(place.where, []).append(kind)
            inputs[place.where] = error["input"]
            continue
        where = place.where
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            where = f"{where}.{_tag_name(error)}"
        message = _message(model_class, place, error)
        if error["type"] == "value_error":
            message += _overrides_below(document, where)
        messages.setdefault(where, []).append(message)
    for where, expected in kinds.items():
        # The branches of a union refuse a value one by one. That is one problem ("must be text or a mapping"),
        # and none at all when the branch of the right kind has said more precisely what is wrong.
        messages.setdefault(where, [_wrong_kind(list(dict.fromkeys(expected)), inputs[where])])
    return [document.problem(where, message) for where, listed in messages.items() for message in listed]


def _expected_kind(place: Place, error: ErrorDetails) -> str | None:
    if error["type"] == "literal_error" and place.in_union:
        return " or ".join(str(value) for value in _literals(place.annotation))
    return _KINDS.get(error["type"])


def _overrides_below(document: Document, where: str) -> str:
    prefix = f"{where}." if where else ""
    overrides = dict.fromkeys(text for path, text in document.overrides.items() if path.startswith(prefix))
    return f" (with override {', '.join(overrides)})" if overrides else ""


def _message(model_class: type[BaseModel], place: Place, error: ErrorDetails) -> str:
    context: Mapping[str, Any] = error.get("ctx", {})
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(model_class, place)
        case "missing":
            info = place.owner.model_fields[place.path[-1]] if place.owner else FieldInfo()
            description = info.description or (place.annotation.__doc__ if _is_model(place.annotation) else None)
            return f"is missing: {description}" if description else "is missing"
        case "union_tag_not_found":
            return f"is missing: one of {_listed(_tags(place))}"
        case "union_tag_invalid":
            return _not_one_of(context["tag"], _tags(place))
        case "literal_error":
            return _not_one_of(value, _literals(place.annotation))
        case kind if kind in _BOUNDS:
            bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
            return f"is {_shown(value)}, but must be {_BOUNDS[kind].format(**bounds)}"
        case "too_short":
            return f"needs at least {_counted(context['min_length'], 'item')}"
        case "string_too_long":
            return f"is longer than {_counted(context['max_length'], 'character')}"
        case "string_pattern_mismatch":
            return f"is {_shown(value)}, but must match {context['pattern']}"
        case "value_error":
            return str(context["error"])
        case _:
            return f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {_shown(value)}"


def _unknown_key(model_class: type[BaseModel], place: Place) -> str:
    key = place.path[-1]
    known = list(place.owner.model_fields) if place.owner else []
    elsewhere = [path for path in field_paths(model_class) if path.rpartition(".")[2] == key]
    if elsewhere and not get_close_matches(key, known, n=1, cutoff=0.8):
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    hint = near_match(key, known)
    return f"unknown key; {hint}" if hint else "unknown key"


def _wrong_kind(kinds: Sequence[str], value: Any) -> str:
    message = f"must be {' or '.join(kinds)}, not {_shown(value)}"
    if value is None:
        return f"{message}; remove the key, or give it a value"
    if not isinstance(value, str):
        return f"{message}; put it in quotes" if "text" in kinds and isinstance(value, int | float) else message
    if "a list" in kinds:
        return f"{message}; write it as [{_shown(value)}]"
    if "true or false" in kinds and value.lower() in ("yes", "no", "on", "off"):
        return f"{message}; yes, no, on and off are text in YAML 1.2"
    try:
        float(value)
    except ValueError:
        return message
    return f"{message}; write it without quotes"


def _not_one_of(value: Any, allowed: Sequence[Any]) -> str:
    message = f"is {_shown(value)}, but must be one of {_listed(allowed)}"
    close = get_close_matches(value, [str(item) for item in allowed], n=1, cutoff=0.7) if isinstance(value, str) else []
    if close:
        return f"{message}; did you mean {close[0]}?"
    return message


def _tag_name(error: ErrorDetails) -> str:
    return str(error["ctx"]["discriminator"]).strip("'")


def _tags(place: Place) -> list[Any]:
    base, discriminator = _unwrap(place.annotation)
    return [tag for choice in _choices(base) for tag in _literals(_annotation(choice.model_fields[str(discriminator)]))]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return json.dumps(value)[:60]
