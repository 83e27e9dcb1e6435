"""Shape and parameter count of a model, from its transformers config alone."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from launcher.errors import PlanError, Problem
from launcher.planning.families import FAMILIES, Family, invalid_values, list_parameters, resolve
from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS

_SAME_WORD = 0.85
"""Similarity (difflib) from which an unknown field is taken for a misspelt one: one letter of seven may differ."""


class ModelShape(BaseModel):
    """What the planner knows of a model.

    Attributes:
        model_type: transformers' family name.
        head_dim: width of one attention head.
        max_position_embeddings: longest sequence, `None` when the family has no such bound.
        num_experts: experts of a mixture-of-experts layer, 0 for a dense model.
        num_experts_per_token: experts that one token passes.
        num_parameters: trainable parameters, tied weights counted once.
        num_parameters_non_embedding: without token and position embeddings and the output head.
        num_active_parameters_non_embedding: of those, what one token passes; all of them in a dense model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int | None
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_parameters: int
    num_parameters_non_embedding: int
    num_active_parameters_non_embedding: int


def read_model_config(recipe: Recipe) -> dict[str, Any] | None:
    """Read the transformers config that the recipe names.

    Returns:
        The mapping in the recipe, the named `config.json`, or the one in the local folder of pretrained weights; `None`
        for a hub name, which is read on the workers only.

    Raises:
        PlanError: the file or folder is not there, or holds no config.
    """
    model = recipe.model
    if isinstance(model.config, dict):
        return dict(model.config)
    if model.config is not None:
        path = Path(model.config).expanduser()
        return _read_config_json(recipe, path / "config.json" if path.is_dir() else path, "model.config")
    name = str(model.model_name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read_config_json(recipe, folder / "config.json", "model.model_name_or_path")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise _error(
            recipe, "model.model_name_or_path", f"there is no folder {name}; a hub name has the form owner/model"
        )
    return None


def effective_model_config(recipe: Recipe) -> dict[str, Any]:
    """Return the config that the model is built from: the recipe's, completed by the tokenizer's vocabulary size.

    Raises:
        PlanError: the config can't be read here, or its vocabulary is unknown or smaller than the tokenizer's.
    """
    config = read_model_config(recipe)
    if config is None:
        name = recipe.model.model_name_or_path
        raise _error(recipe, "model.model_name_or_path", f"the config of {name} is on the hub and is not read here")
    config, problem = _with_vocabulary(recipe, config)
    if problem is not None:
        raise PlanError(recipe.name, [problem])
    return config


def check_model(recipe: Recipe) -> dict[str, Any] | None:
    """Read the effective config and check it against the recipe.

    Returns:
        As `effective_model_config`, but `None` for a hub name.

    Raises:
        PlanError: lists everything that is wrong with it.
    """
    config = read_model_config(recipe)
    if config is None:
        return None
    config, vocabulary = _with_vocabulary(recipe, config)
    problems = [problem for problem in (vocabulary, *_config_problems(recipe, config)) if problem is not None]
    if problems:
        raise PlanError(recipe.name, problems)
    return config


def _with_vocabulary(recipe: Recipe, config: dict[str, Any]) -> tuple[dict[str, Any], Problem | None]:
    """Fill in a missing vocabulary size, or say why the model's does not go with the tokenizer's."""
    if not TASKS[recipe.task].tokens:
        return config, None
    stated, from_recipe = config.get("vocab_size"), recipe.model.config is not None
    where = "model.config.vocab_size" if from_recipe else "model.model_name_or_path"
    tokens, source = _tokenizer_size(recipe) or (None, "")
    if stated is None and from_recipe:
        if tokens is None:
            name = recipe.tokenizer.tokenizer_name_or_path
            return config, Problem(f"is not set, and the tokenizer {name} can't be read here; set it", where)
        return {**config, "vocab_size": tokens}, None
    if tokens is not None and isinstance(stated, int) and stated < tokens:
        advice = f"set tokenizer.train.vocab_size to at most {stated}"
        if recipe.tokenizer.train is None:
            advice = f"set vocab_size to at least {tokens}"
        return config, Problem(f"the model has {stated} tokens, but {source} is {tokens}; {advice}", where)
    return config, None


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Count a model from its config.

    Returns:
        `None` when the config is not one that the planner can count; `unknown_reason` says why.
    """
    if unknown_reason(config) is not None:
        return None
    family = FAMILIES[config["model_type"]]
    values = resolve(family, config)
    tensors = list_parameters(config)
    inner = sum(tensor.numel for tensor in tensors if tensor.role in ("body", "expert"))
    experts = sum(tensor.numel for tensor in tensors if tensor.role == "expert")
    number, chosen = values.get("num_experts", 0), values.get("num_experts_per_tok", 0)
    return ModelShape(
        model_type=config["model_type"],
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=family.inner_size(values),
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        max_position_embeddings=values["max_position_embeddings"],
        tie_word_embeddings=values["tie_word_embeddings"],
        num_experts=number,
        num_experts_per_token=chosen,
        num_parameters=sum(tensor.numel for tensor in tensors),
        num_parameters_non_embedding=inner,
        num_active_parameters_non_embedding=inner - experts + (experts * chosen // number if number else 0),
    )


def unknown_reason(config: Mapping[str, Any]) -> str | None:
    """Say why a config can't be counted; `None` when it can."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        return f"model_type {config.get('model_type')!r} is none of those the planner knows: {known}"
    for key, counted in family.only.items():
        if config.get(key, counted) != counted:
            return f"{key}={config[key]!r} is not counted"
    if config.get("per_layer_config"):
        return "per_layer_config is not counted"
    if wrong := invalid_values(family, config):
        return "; ".join(f"{key} must be {kind}" for key, kind in wrong.items())
    return None


def _config_problems(recipe: Recipe, config: Mapping[str, Any]) -> list[Problem]:
    """Everything in an effective config that transformers, or a sequence of the recipe, would fail on."""
    where = "model.config" if recipe.model.config is not None else "model.model_name_or_path"
    family = FAMILIES.get(config.get("model_type", ""))
    problems = []
    if family is not None:
        wrong = invalid_values(family, config)
        problems += [Problem(f"{config[key]!r} must be {kind}", f"{where}.{key}") for key, kind in wrong.items()]
        if isinstance(recipe.model.config, dict):
            problems += _misspelt_fields(recipe.model.config)
        if not wrong:
            problems += _head_problems(family, config, where)
    positions = _positions(family, config)
    if positions is not None and recipe.data.sequence_length > positions:
        advice = f"set it to at most {positions}"
        if recipe.model.config is not None:
            advice += f", or model.config.max_position_embeddings to at least {recipe.data.sequence_length}"
        message = f"{recipe.data.sequence_length} is longer than the model's {positions} positions; {advice}"
        problems.append(Problem(message, "data.sequence_length"))
    return problems


def _positions(family: Family | None, config: Mapping[str, Any]) -> int | None:
    values = config if family is None else resolve(family, config)
    positions = values.get("max_position_embeddings")
    return positions if type(positions) is int else None


def _head_problems(family: Family, config: Mapping[str, Any], where: str) -> list[Problem]:
    values = resolve(family, config)
    hidden, heads, kv_heads = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    problems = []
    if family.heads_divide_hidden and hidden % heads:
        near = f"{hidden // heads * heads or heads} or {-(-hidden // heads) * heads}"
        message = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set hidden_size to {near}"
        problems.append(Problem(message, f"{where}.num_attention_heads"))
    if heads % kv_heads:
        fits = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        message = f"{kv_heads} does not divide num_attention_heads {heads}; set it to one of {fits}"
        problems.append(Problem(message, f"{where}.num_key_value_heads"))
    rotary = "head_dim" in family.defaults and "partial_rotary_factor" not in {**config, **_rope_parameters(config)}
    if rotary and values["head_dim"] % 2:
        message = (
            f"head_dim {values['head_dim']} is odd, but rotary positions turn pairs; set head_dim to an even number"
        )
        problems.append(Problem(message, f"{where}.head_dim"))
    return problems


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    return dict(parameters) if isinstance(parameters, Mapping) else {}


def _misspelt_fields(config: Mapping[str, Any]) -> list[Problem]:
    """Fields that are nearly one of the family's: transformers would keep them unread and take its default."""
    known = _fields(config["model_type"])
    problems = []
    for key in config:
        near = get_close_matches(key, known, n=1, cutoff=_SAME_WORD)
        if key not in known and near:
            problems.append(
                Problem(f"is not a field of {config['model_type']}; did you mean {near[0]}?", f"model.config.{key}")
            )
    return problems


def unread_fields(recipe: Recipe) -> list[str]:
    """Fields of a config in the recipe that transformers' class does not know; it keeps them without reading them."""
    config = recipe.model.config
    if not isinstance(config, dict) or config["model_type"] not in FAMILIES:
        return []
    known = _fields(config["model_type"])
    return [key for key in config if key not in known]


@cache
def _fields(model_type: str) -> frozenset[str]:
    """Names that the transformers config class of a family takes, as `model_config_fields.json` lists them."""
    listed = json.loads(files("launcher.planning").joinpath("model_config_fields.json").read_text("utf-8"))
    return frozenset(listed["every_family"]) | frozenset(listed["families"][model_type])


def _tokenizer_size(recipe: Recipe) -> tuple[int, str] | None:
    """Number of tokens and where it comes from; `None` when the tokenizer is the model's own or on the hub."""
    tokenizer = recipe.tokenizer
    if tokenizer.train is not None:
        return tokenizer.train.vocab_size, "tokenizer.train.vocab_size"
    if tokenizer.tokenizer_name_or_path is None:
        return None
    path = Path(tokenizer.tokenizer_name_or_path).expanduser() / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        size = 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", ()))])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} is not a tokenizer.json of the tokenizers library: {type(error).__name__}: {error}"
        raise _error(recipe, "tokenizer.tokenizer_name_or_path", message) from error
    return size, str(path)


def _read_config_json(recipe: Recipe, path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _error(recipe, where, f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise _error(recipe, where, f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _error(recipe, where, f"{path} is not a transformers config: it has no model_type")
    return config


def _error(recipe: Recipe, where: str, message: str) -> PlanError:
    return PlanError(recipe.name, [Problem(message, where)])
