"""Overrides: where they lead, how their values are read, and how a bad one is named."""

import pytest

from launcher.errors import RecipeError
from launcher.recipe.loading import load_recipe


def refusal(path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.max_steps=100", "training", "max_steps", 100),
        ("max_steps=100", "training", "max_steps", 100),
        ("learning_rate=1e-5", "training", "learning_rate", 1e-5),
        ("gradient_checkpointing=true", "training", "gradient_checkpointing", True),
        ("save_total_limit=null", "checkpoint", "save_total_limit", None),
        ("save_total_limit=", "checkpoint", "save_total_limit", None),
        ("evaluation={eval_steps: 5}", "evaluation", "eval_steps", 5),
        ("evaluation.eval_steps=5", "evaluation", "eval_steps", 5),
        ("lr_scheduler_kwargs={min_lr_rate: 0.1}", "training", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
        ("training.lr_scheduler_kwargs.min_lr_rate=0.1", "training", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
        ("model.config.hidden_size=8", "model", "config", {"model_type": "llama", "hidden_size": 8}),
        ("deepspeed.overrides.a.b=[1]", "deepspeed", "overrides", {"a": {"b": [1]}}),
    ],
)
def test_an_override_sets_one_field(write_recipe, override, section, field, value):
    result = getattr(getattr(load_recipe(write_recipe(), [override]), section), field)
    assert result == value
    assert type(result) is type(value)


def test_a_number_in_the_key_is_an_index(write_recipe):
    recipe = load_recipe(write_recipe(), ["data.sources.0.weight=2", "data.sources.0.files.0=/other/*.txt"])
    assert recipe.data.sources[0].weight == 2.0
    assert recipe.data.sources[0].files == ("/other/*.txt",)


def test_a_value_may_hold_equals_signs_and_references(write_recipe, monkeypatch):
    monkeypatch.setenv("ZF_PLACE", "there")
    assert load_recipe(write_recipe(), ["description=a=${env:ZF_PLACE}"]).description == "a=there"


def test_the_last_override_of_a_key_wins(write_recipe):
    assert load_recipe(write_recipe(), ["max_steps=1", "training.max_steps=2"]).training.max_steps == 2


def test_an_override_mends_what_is_wrong_in_the_file(write_recipe):
    path = write_recipe(("max_steps: 10", "max_steps: ten"))
    assert load_recipe(path, ["max_steps=10"]).training.max_steps == 10
    assert load_recipe(path, ["training={max_steps: 3}"]).training.max_steps == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps", "override max_steps: must be written key=value or key.sub=value"),
        ("=3", "override =3: must be written key=value"),
        ("training..max_steps=3", "override training..max_steps=3: must be written key=value"),
        ("max_stepz=3", "override max_stepz=3: unknown key; did you mean training.max_steps?"),
        ("hidden_size=3", "override hidden_size=3: unknown key; did you mean model.config.hidden_size?"),
        ("zzzzz=3", "override zzzzz=3: unknown key"),
        ("config=x", "override config=x: config stands in several sections; write model.config or deepspeed.config"),
        ("max_steps=[1", "override max_steps=[1: the value is not YAML: while parsing a flow sequence"),
        ("max_steps=!x 1", "override max_steps=!x 1: the value the tag !x is refused"),
        ("data.sources.0.files=**/*.py", "text that begins with * needs quotes; a value is YAML, such as 3, [a, b]"),
        ("data.sources.1.weight=2", "data.sources is a list, and '1' is not an index of it (0 to 0)"),
        ("data.sources.first.weight=2", "data.sources is a list, and 'first' is not an index of it (0 to 0)"),
        ("name.sub=2", "override name.sub=2: name is 'small' and has no keys; set name itself"),
        (
            "training.max_stepz=3",
            "training.max_stepz: unknown key; did you mean max_steps? (override training.max_stepz=3)",
        ),
        ("trainin.max_steps=3", "trainin: unknown key; did you mean training? (override trainin.max_steps=3)"),
        (
            "data.sources.0.wieght=3",
            "data.sources.0.wieght: unknown key; did you mean weight? (override data.sources.0.wieght=3)",
        ),
        ("max_steps=0", "training.max_steps: is 0, but must be at least 1 (override max_steps=0)"),
        (
            "data.sources.0={type: text, files: [3]}",
            "data.sources.0.files.0: must be text, not 3; put it in quotes (override data.sources.0=",
        ),
        (
            "num_train_epochs=1",
            "line 16  training: set exactly one of max_steps and num_train_epochs (with override num_train_epochs=1)",
        ),
        ("description=${env:ZF_NOT_SET}", "description: the environment variable ZF_NOT_SET is not set;"),
    ],
)
def test_a_bad_override_is_named_in_place_of_a_line(write_recipe, monkeypatch, override, expected):
    monkeypatch.delenv("ZF_NOT_SET", raising=False)
    path = write_recipe()
    message = refusal(path, override)
    assert message.startswith(f"{path}: 1 problem\n")
    assert expected in message


def test_a_section_that_only_an_override_makes_names_it(write_recipe):
    path = write_recipe(("tokenizer:\n  train:\n    vocab_size: 512\n", ""))
    message = refusal(path, "tokenizer.train.min_frequency=3")
    assert "tokenizer.train.vocab_size: is missing" in message
    assert "(override tokenizer.train.min_frequency=3)" in message
