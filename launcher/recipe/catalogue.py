"""The recipes and DeepSpeed configs that ship with ZeroFleet, found in an installed wheel as in a clone."""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.errors import Problem
from cluster.strict_yaml import read_yaml
from cluster.validation import near_match
from launcher.errors import RecipeError, StorageError

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """One entry of the catalogue.

    Attributes:
        name: path below the recipes' root without its suffix, such as `pretrain/gpt2`.
        path: the file.
        command: the command that runs it: the file's first comment line.
        description: the recipe's `description`.
    """

    name: str
    path: Path
    command: str
    description: str


def recipes_root() -> Path:
    """Folder of the shipped recipes."""
    return _shipped("recipes")


def deepspeed_configs_root() -> Path:
    """Folder of the shipped DeepSpeed configs."""
    return _shipped("deepspeed_configs")


@cache
def _shipped(folder: str) -> Path:
    in_wheel = _PACKAGE / "_shipped" / folder
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / folder


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    root = recipes_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def list_recipes() -> list[ShippedRecipe]:
    """Read the catalogue, sorted by name."""
    return [_entry(name) for name in recipe_names()]


def _entry(name: str) -> ShippedRecipe:
    path = recipes_root() / f"{name}.yaml"
    first_line = path.read_text(encoding="utf-8").partition("\n")[0]
    command = first_line.lstrip("# ").strip() if first_line.startswith("#") else ""
    description = read_yaml(path, RecipeError).data.get("description", "")
    return ShippedRecipe(name, path, command, " ".join(str(description).split()))


def shipped_recipe(name: str) -> ShippedRecipe:
    """Look one recipe up by name.

    Raises:
        RecipeError: there is none of that name.
    """
    known = recipe_names()
    if name.removesuffix(".yaml") not in known:
        raise RecipeError(name, [Problem(f"no shipped recipe has this name; {_suggestion(name, known)}")])
    return _entry(name.removesuffix(".yaml"))


def find_recipe(path_or_name: str | Path) -> Path:
    """Find a recipe: a file if there is one, otherwise the shipped recipe of that name.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(path_or_name)
    if path.is_file() or (path.exists() and path.suffix in _SUFFIXES):
        return path
    known = recipe_names()
    name = str(path_or_name).removesuffix(".yaml")
    if name in known:
        return recipes_root() / f"{name}.yaml"
    raise RecipeError(
        str(path_or_name), [Problem(f"no such file, and no shipped recipe of this name; {_suggestion(name, known)}")]
    )


def _suggestion(name: str, known: list[str]) -> str:
    by_leaf = [entry for entry in known if entry.rpartition("/")[2] == name.rpartition("/")[2]]
    if by_leaf:
        return f"did you mean {' or '.join(by_leaf)}?"
    return near_match(name, known) or "`zerofleet recipes ls` lists them"


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a shipped recipe to a new file, or into a folder under its own name.

    Returns:
        The new file.

    Raises:
        RecipeError: there is no shipped recipe of that name.
        StorageError: the new file exists already or cannot be written.
    """
    source = shipped_recipe(name).path
    target = destination / source.name if destination.is_dir() else destination
    try:
        with source.open("rb") as original, target.open("xb") as copy:
            shutil.copyfileobj(original, copy)
    except FileExistsError as error:
        raise StorageError(f"{target} exists already; name another file") from error
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error
    return target
