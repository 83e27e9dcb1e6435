import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from launcher.errors import PlanError
from launcher.planning.families import FAMILIES
from launcher.planning.model_shape import (
    check_model,
    effective_model_config,
    model_shape,
    read_model_config,
    unknown_reason,
    unread_fields,
)
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

ODD_HEADS = {"model_type": "llama", "vocab_size": 1000, "num_hidden_layers": 1, "intermediate_size": 64}


def config_file(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", **fields}))
    return path


def tokenizer_folder(folder: Path, vocabulary: Any, added: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    content = {"model": {"vocab": vocabulary}, "added_tokens": added or []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def problems_of(recipe: Recipe) -> dict[str, str]:
    with pytest.raises(PlanError) as caught:
        check_model(recipe)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_a_config_is_read_from_the_recipe_a_file_a_folder_or_pretrained_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = config_file(tmp_path / "model", n_layer=2)
    assert read_model_config(make_recipe()) == make_recipe().model.config
    for place in (path, path.parent):
        assert read_model_config(make_recipe({"model.config": str(place)})) == {"model_type": "gpt2", "n_layer": 2}
    pretrained = make_recipe({"model.config": None, "model.model_name_or_path": str(path.parent)})
    assert read_model_config(pretrained) == {"model_type": "gpt2", "n_layer": 2}


def test_a_hub_name_is_not_read_here(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"model.config": None, "model.model_name_or_path": "gpt2"})
    assert read_model_config(recipe) is None
    assert check_model(recipe) is None
    with pytest.raises(PlanError, match="the config of gpt2 is on the hub and is not read here"):
        effective_model_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: No such file or directory"),
        ("{", "config.json is not JSON: "),
        ('{"hidden_size": 3}', "config.json is not a transformers config: it has no model_type"),
        ("[]", "config.json is not a transformers config: it has no model_type"),
    ],
)
def test_a_bad_config_file_is_refused(make_recipe: MakeRecipe, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=f"model.config: .*{re.escape(message)}"):
        read_model_config(make_recipe({"model.config": str(path)}))


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "runs/small/export"])
def test_a_path_without_a_folder_is_not_taken_for_a_hub_name(make_recipe: MakeRecipe, name: str) -> None:
    with pytest.raises(PlanError, match="there is no folder"):
        read_model_config(make_recipe({"model.config": None, "model.model_name_or_path": name}))


def test_a_trained_tokenizer_gives_the_vocabulary_size(make_recipe: MakeRecipe) -> None:
    assert effective_model_config(make_recipe())["vocab_size"] == 1000
    assert effective_model_config(make_recipe({"model.config.vocab_size": 1024}))["vocab_size"] == 1024


@pytest.mark.parametrize(
    ("vocabulary", "added", "size"),
    [
        ({"a": 0, "b": 1}, [], 2),
        ({"a": 0, "b": 1}, [{"id": 1, "content": "b"}, {"id": 7, "content": "<pad>"}], 8),
        ([["a", 0.0], ["b", -1.0], ["c", -2.0]], [], 3),
    ],
)
def test_a_local_tokenizer_gives_the_vocabulary_size(
    make_recipe: MakeRecipe, tmp_path: Path, vocabulary: Any, added: list[dict[str, Any]], size: int
) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", vocabulary, added)
    recipe = make_recipe({"tokenizer.train": None, "tokenizer.tokenizer_name_or_path": str(folder)})
    assert effective_model_config(recipe)["vocab_size"] == size


def test_a_vocabulary_that_nothing_tells_must_be_set(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"tokenizer.train": None, "tokenizer.tokenizer_name_or_path": "owner/tokenizer"})
    assert problems_of(recipe) == {
        "model.config.vocab_size": "is not set, and the tokenizer owner/tokenizer can't be read here; set it"
    }


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the model has 999 tokens"):
        effective_model_config(make_recipe({"model.config.vocab_size": 999}))
    assert problems_of(make_recipe({"model.config.vocab_size": 999})) == {
        "model.config.vocab_size": "the model has 999 tokens, but tokenizer.train.vocab_size is 1000; "
        "set tokenizer.train.vocab_size to at most 999"
    }
    folder = tokenizer_folder(tmp_path / "tokenizer", {"a": 0, "b": 1})
    changes = {"tokenizer.train": None, "tokenizer.tokenizer_name_or_path": str(folder), "model.config.vocab_size": 1}
    assert problems_of(make_recipe(changes)) == {
        "model.config.vocab_size": f"the model has 1 tokens, but {folder}/tokenizer.json is 2; "
        "set vocab_size to at least 2"
    }


def test_a_broken_tokenizer_file_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    recipe = make_recipe({"tokenizer.train": None, "tokenizer.tokenizer_name_or_path": str(tmp_path)})
    assert (
        "is not a tokenizer.json of the tokenizers library" in problems_of(recipe)["tokenizer.tokenizer_name_or_path"]
    )


def test_everything_wrong_with_a_config_is_told_at_once(make_recipe: MakeRecipe) -> None:
    changes = {
        "model.config.hiden_size": 64,
        "model.config.hidden_size": 66,
        "model.config.num_key_value_heads": 3,
        "model.config.vocab_size": 10,
        "model.config.max_position_embeddings": 16,
    }
    assert problems_of(make_recipe(changes)) == {
        "model.config.vocab_size": "the model has 10 tokens, but tokenizer.train.vocab_size is 1000; "
        "set tokenizer.train.vocab_size to at most 10",
        "model.config.hiden_size": "is not a field of llama; did you mean hidden_size?",
        "model.config.num_attention_heads": "hidden_size 66 is not a multiple of num_attention_heads 4; "
        "set hidden_size to 64 or 68",
        "model.config.num_key_value_heads": "3 does not divide num_attention_heads 4; set it to one of 1, 2, 4",
        "data.sequence_length": "32 is longer than the model's 16 positions; set it to at most 16, "
        "or model.config.max_position_embeddings to at least 32",
    }


def test_a_sequence_longer_than_pretrained_positions_can_only_be_shortened(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = config_file(tmp_path, n_positions=16)
    recipe = make_recipe({"model.config": None, "model.model_name_or_path": str(path.parent), "tokenizer.train": None})
    assert problems_of(recipe) == {
        "data.sequence_length": "32 is longer than the model's 16 positions; set it to at most 16"
    }


def test_the_positions_of_an_unknown_family_are_checked_as_far_as_stated(make_recipe: MakeRecipe) -> None:
    config = {"model_type": "brand_new", "max_position_embeddings": 16, "vocab_size": 2000}
    assert "data.sequence_length" in problems_of(make_recipe({"model.config": config}))
    assert check_model(make_recipe({"model.config": {"model_type": "brand_new", "vocab_size": 2000}})) is not None


def test_an_odd_head_width_is_refused_where_transformers_refuses_it(make_recipe: MakeRecipe) -> None:
    fields = {**ODD_HEADS, "hidden_size": 60, "num_attention_heads": 4}
    message = "head_dim 15 is odd, but rotary positions turn pairs; set head_dim to an even number"
    assert problems_of(make_recipe({"model.config": fields})) == {"model.config.head_dim": message}
    with pytest.raises(StrictDataclassError):
        forward("llama", {name: value for name, value in fields.items() if name != "model_type"})
    partial = {**fields, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert check_model(make_recipe({"model.config": partial})) is not None


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("hidden_size", "64", "a positive whole number"),
        ("num_hidden_layers", 0, "a positive whole number"),
        ("num_attention_heads", True, "a positive whole number"),
        ("intermediate_size", None, "a positive whole number"),
        ("tie_word_embeddings", "yes", "true or false"),
    ],
)
def test_wrong_types_are_refused(make_recipe: MakeRecipe, field: str, value: Any, kind: str) -> None:
    recipe = make_recipe()
    config = {**dict(recipe.model.config or {}), field: value}  # type: ignore[arg-type]  # never a path here
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    assert problems_of(changed) == {f"model.config.{field}": f"{value!r} must be {kind}"}
    assert model_shape(config) is None


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("mlp_only_layers", 3, "a list of layer numbers"),
        ("mlp_only_layers", ["0"], "a list of layer numbers"),
        ("num_experts", -1, "a whole number, 0 for a dense model"),
    ],
)
def test_wrong_types_of_mixtures_are_refused(make_recipe: MakeRecipe, field: str, value: Any, kind: str) -> None:
    config = {"model_type": "qwen2_moe", field: value}
    assert problems_of(make_recipe({"model.config": config})) == {f"model.config.{field}": f"{value!r} must be {kind}"}
    assert model_shape(config) is None


def test_null_means_the_familys_own_rule_where_transformers_has_one() -> None:
    shape = model_shape({"model_type": "llama", "num_key_value_heads": None, "head_dim": None})
    assert shape is not None
    assert (shape.num_key_value_heads, shape.head_dim) == (32, 128)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.heads_divide_hidden])
def test_transformers_refuses_the_heads_that_we_refuse(model_type: str) -> None:
    spelt = {ours: native for native, ours in FAMILIES[model_type].aliases.items()}
    fields = {"hidden_size": 66, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    native = {spelt.get(name, name): value for name, value in fields.items()}
    with pytest.raises((ValueError, RuntimeError, StrictDataclassError)):
        forward(model_type, {**native, "pad_token_id": None})


def forward(model_type: str, fields: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **fields))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_what_cannot_be_counted_says_why() -> None:
    assert "model_type 'bert' is none of those the planner knows: gemma, " in str(
        unknown_reason({"model_type": "bert"})
    )
    assert (
        unknown_reason({"model_type": "gpt2", "add_cross_attention": True}) == "add_cross_attention=True is not counted"
    )
    assert unknown_reason({"model_type": "llama", "per_layer_config": {"0": {}}}) == "per_layer_config is not counted"
    assert model_shape({"model_type": "bert"}) is None
    assert unknown_reason({"model_type": "gpt2", "add_cross_attention": False}) is None


def test_fields_that_transformers_does_not_know_are_listed(make_recipe: MakeRecipe) -> None:
    assert unread_fields(make_recipe()) == []
    assert unread_fields(make_recipe({"model.config.my_note": 1, "model.config.rope_theta": 1e4})) == ["my_note"]
