"""A recipe from its file: read, overridden, references resolved, validated, paths made absolute. And back to YAML."""

import glob
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from cluster.errors import DocumentError
from cluster.strict_yaml import Document, read_yaml
from cluster.validation import validate
from launcher.errors import RecipeError
from launcher.recipe.catalogue import find_recipe
from launcher.recipe.data_sections import HubSource, SavedSource, ScikitLearnSource, Source
from launcher.recipe.overrides import apply_overrides
from launcher.recipe.references import escape, resolve_references
from launcher.recipe.schema import Recipe

_PATH_BEGINNINGS = ("./", "../", "/", "~/")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with the file it came from.

    Attributes:
        recipe: the recipe, complete.
        path: the file, absolute.
        document: the file's values with their lines.
    """

    recipe: Recipe
    path: Path
    document: Document

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Give errors about the recipe's fields that are raised inside the file's name and the fields' lines."""
        try:
            yield
        except DocumentError as error:
            if error.source not in ("recipe", self.recipe.name):
                raise
            problems = [
                self.document.problem(problem.where, problem.message) if problem.line is None else problem
                for problem in error.problems
            ]
            raise type(error)(self.document.source, problems) from error


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe.

    Args:
        path_or_name: a file, or the name of a shipped recipe (`quickstart`, `pretrain/gpt2`).
        overrides: `key.sub=value` each, read as YAML and laid over the file in order.

    Returns:
        The recipe with references resolved and paths absolute.

    Raises:
        RecipeError: lists everything that is wrong, with lines and near matches.
    """
    return read_recipe(path_or_name, overrides).recipe


def read_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Load a recipe and keep where each value came from; see `load_recipe`."""
    found = find_recipe(path_or_name)
    path = found.absolute()
    document = read_yaml(found, RecipeError)
    apply_overrides(document, overrides, Recipe)
    resolve_references(document, path.parent)
    recipe = validate(Recipe, document, RecipeError)
    return RecipeFile(_with_absolute_paths(recipe, path.parent), path, document)


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Take relative paths from the recipe's folder, so that the recipe means the same from any working directory."""
    model, tokenizer, data, deepspeed = recipe.model, recipe.tokenizer, recipe.data, recipe.deepspeed
    config = model.config if not isinstance(model.config, str) else _absolute(model.config, folder)
    deepspeed_config = deepspeed.config
    if deepspeed_config is not None and Path(_absolute(deepspeed_config, folder)).is_file():
        deepspeed_config = _absolute(deepspeed_config, folder)
    return recipe.model_copy(
        update={
            "model": model.model_copy(
                update={"model_name_or_path": _name_or_path(model.model_name_or_path, folder), "config": config}
            ),
            "tokenizer": tokenizer.model_copy(
                update={
                    "tokenizer_name_or_path": _name_or_path(tokenizer.tokenizer_name_or_path, folder),
                    "chat_template": None
                    if tokenizer.chat_template is None
                    else tokenizer.chat_template
                    if tokenizer.chat_template == "chatml"
                    else _absolute(tokenizer.chat_template, folder),
                }
            ),
            "data": data.model_copy(
                update={
                    "sources": tuple(_absolute_source(source, folder) for source in data.sources),
                    "validation_sources": tuple(_absolute_source(source, folder) for source in data.validation_sources),
                    "cache_directory": None
                    if data.cache_directory is None
                    else _absolute(data.cache_directory, folder),
                }
            ),
            "distillation": None
            if recipe.distillation is None
            else recipe.distillation.model_copy(
                update={"teacher_name_or_path": _name_or_path(recipe.distillation.teacher_name_or_path, folder)}
            ),
            "adapter": None
            if recipe.adapter is None
            else recipe.adapter.model_copy(
                update={"adapter_name_or_path": _name_or_path(recipe.adapter.adapter_name_or_path, folder)}
            ),
            "optimizer": recipe.optimizer
            if recipe.optimizer.ewc is None
            else recipe.optimizer.model_copy(
                update={
                    "ewc": recipe.optimizer.ewc.model_copy(
                        update={
                            "sources": tuple(
                                _absolute_source(source, folder) for source in recipe.optimizer.ewc.sources
                            )
                        }
                    )
                }
            ),
            "deepspeed": deepspeed.model_copy(update={"config": deepspeed_config}),
        }
    )


def _absolute_source(source: Source, folder: Path) -> Source:
    if isinstance(source, HubSource | ScikitLearnSource):
        return source
    if isinstance(source, SavedSource):
        return source.model_copy(update={"path": _absolute(source.path, folder)})
    # The folder's own name is no pattern, even when it holds a [ or a *.
    literal_folder = Path(glob.escape(str(folder)))
    return source.model_copy(
        update={
            "files": tuple(_absolute(pattern, literal_folder) for pattern in source.files),
            "exclude": tuple(
                _absolute(pattern, literal_folder) if pattern.startswith(_PATH_BEGINNINGS) else pattern
                for pattern in source.exclude
            ),
        }
    )


def _absolute(path: str, folder: Path) -> str:
    if path == "~" or path.startswith("~/"):
        path = f"{Path.home()}{path[1:]}"
    return os.path.normpath(folder / path)


def _name_or_path(value: str | None, folder: Path) -> str | None:
    if value is not None and (value in (".", "..", "~") or value.startswith(_PATH_BEGINNINGS)):
        return _absolute(value, folder)
    return value


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that loads to an equal recipe, defaults included.

    It holds no secrets: references to them are refused when a recipe is loaded.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
    yaml.allow_unicode = True
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(_plain(recipe), stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    def represent_text(self, text: str) -> ScalarNode:
        # In single quotes, ruamel writes line separators (U+0085, U+2028) that no reader gives back.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_text)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        items = [(name, getattr(value, name), info.default) for name, info in fields]
        # None is left out only where it is the default: elsewhere it says something (`save_total_limit: null`).
        return {name: _plain(item) for name, item, default in items if not (item is None and default is None)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return escape(value) if isinstance(value, str) else value


def recipe_hash(recipe: Recipe) -> str:
    """Hash a recipe's content (XXH3, 128 bits, hexadecimal); the layout of its file plays no part."""
    from xxhash import xxh3_128_hexdigest

    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxh3_128_hexdigest(canonical.encode())


def differences(checkpoint: Recipe, recipe: Recipe, sections: Sequence[str]) -> list[str]:
    """Say where two recipes differ, one line a field.

    Args:
        checkpoint: the recipe that a checkpoint was made by.
        recipe: the recipe that is to resume from it.
        sections: dotted paths of the sections or fields to compare, such as `model` and `data.sequence_length`.

    Returns:
        Lines such as `model.config.hidden_size: 128 in the checkpoint, 256 in the recipe`; empty when they agree.
    """
    old, new = (_leaves(document.model_dump(mode="json"), "") for document in (checkpoint, recipe))
    return [
        f"{path}: {_shown(old.get(path))} in the checkpoint, {_shown(new.get(path))} in the recipe"
        for path in dict.fromkeys([*old, *new])
        if any(path == section or path.startswith(f"{section}.") for section in sections)
        and old.get(path) != new.get(path)
    ]


def _leaves(value: Any, path: str) -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= _leaves(item, f"{path}.{key}" if path else str(key))
    return leaves or {path: value}


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
