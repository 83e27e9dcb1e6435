"""References in a recipe's text: `${env:NAME}`, `${env:NAME:-default}`, `${sysconfig:stdlib}`, `${recipe_dir}`.

Each kind looks up one thing; nothing in a recipe is ever executed. `$${` writes a plain `${`.
"""

import os
import re
import sysconfig
from pathlib import Path
from typing import Any

from cluster.strict_yaml import Document
from cluster.validation import near_match

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^{}]*)\}|\$\{")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


class _ReferenceError(ValueError):
    """A reference cannot be resolved; the text says why."""


def resolve_references(document: Document, recipe_directory: Path) -> None:
    """Replace the references in all text values of a document, in place; bad ones are added to its problems.

    Args:
        document: a recipe, overrides applied.
        recipe_directory: what `${recipe_dir}` stands for.
    """
    document.data = _resolved(document, document.data, "", recipe_directory)


def escape(text: str) -> str:
    """Write text so that `resolve_references` gives it back unchanged."""
    return text.replace("${", "$${")


def _resolved(document: Document, value: Any, path: str, directory: Path) -> Any:
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        return {key: _resolved(document, item, f"{prefix}{key}", directory) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(document, item, f"{path}.{index}", directory) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        text = _REFERENCE.sub(lambda match: _look_up(match, directory), value)
        text.encode()
    except UnicodeEncodeError:
        message = f"{value} stands for something that is not UTF-8 text"
    except _ReferenceError as error:
        message = str(error)
    else:
        return text
    document.problems.append(document.problem(path, message))
    document.unread.add(path)
    return value


def _look_up(match: re.Match[str], directory: Path) -> str:
    if match.group() == "$${":
        return "${"
    body = match.group("body")
    if body is None:
        raise _ReferenceError("holds a ${ without its }, or a reference inside a reference; $${ is a plain ${")
    kind, colon, name = body.partition(":")
    if kind == "env" and colon:
        return _environment(name)
    if kind == "sysconfig" and colon:
        return _installation_path(name)
    if body == "recipe_dir":
        return str(directory)
    raise _ReferenceError(
        f"unknown reference {match.group()}; there are ${{env:NAME}}, ${{env:NAME:-default}}, ${{sysconfig:NAME}} and "
        "${recipe_dir}, and $${ is a plain ${"
    )


def _environment(body: str) -> str:
    name, has_default, default = body.partition(":-")
    if not _ENVIRONMENT_NAME.fullmatch(name):
        raise _ReferenceError(f"${{env:{body}}}: {name!r} is no name of an environment variable")
    if _SECRET.search(name):
        raise _ReferenceError(
            f"${{env:{name}}} looks like a secret, and a recipe is stored with its run for all to read; take it out of "
            "the recipe: the library that needs it reads the environment itself"
        )
    value = os.environ.get(name, "")
    if has_default:
        return value or default
    if name not in os.environ:
        raise _ReferenceError(
            f"the environment variable {name} is not set; set it, or give a default: ${{env:{name}:-default}}"
        )
    return value


def _installation_path(name: str) -> str:
    paths = sysconfig.get_paths()
    if name not in paths:
        raise _ReferenceError(f"Python's sysconfig has no path {name!r}; {near_match(name, list(paths))}")
    return paths[name]
