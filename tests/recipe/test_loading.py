"""From file to recipe and back: paths, round trip, hash and differences."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import PlanError, Problem, RecipeError
from launcher.recipe.data_sections import DataSection, HubSource, TextSource
from launcher.recipe.layout_sections import DeepSpeedSection
from launcher.recipe.loading import differences, dump_recipe, load_recipe, read_recipe, recipe_hash
from launcher.recipe.model_sections import ModelSection, TokenizerSection
from launcher.recipe.schema import Recipe
from launcher.recipe.training_sections import TrainingSection


def test_relative_paths_are_taken_from_the_folder_of_the_recipe(write_recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write_recipe(
        ("  config:\n    model_type: llama\n    hidden_size: 64\n", "  config: models/config.json\n"),
        ("  train:\n    vocab_size: 512\n", "  tokenizer_name_or_path: ./tokenizer\n"),
        (
            "    - type: text\n      files: [texts/*.txt]\n",
            "    - type: text\n"
            "      files: [texts/*.txt, ../up/**/*.txt, /abs/*.txt, ~/home.txt]\n"
            "      exclude: ['**/test/**', '*.bak', texts/draft*, ./texts/old*, ~/x, /abs/x]\n"
            "    - {type: saved, path: ../saved}\n"
            "    - {type: hub, path: owner/name}\n",
        ),
        ("  sequence_length: 32\n", "  sequence_length: 32\n  cache_directory: cache\n"),
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("../small.yaml")
    assert recipe == load_recipe(path)
    text, saved, hub = recipe.data.sources
    folder, parent = str(tmp_path), str(tmp_path.parent)
    assert text.files == (f"{folder}/texts/*.txt", f"{parent}/up/**/*.txt", "/abs/*.txt", "/home/someone/home.txt")
    assert text.exclude == (
        "**/test/**",
        "*.bak",
        "texts/draft*",
        f"{folder}/texts/old*",
        "/home/someone/x",
        "/abs/x",
    )
    assert saved.path == f"{parent}/saved"
    assert hub.path == "owner/name"
    assert recipe.model.config == f"{folder}/models/config.json"
    assert recipe.tokenizer.tokenizer_name_or_path == f"{folder}/tokenizer"
    assert recipe.data.cache_directory == f"{folder}/cache"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("gpt2", "gpt2"),
        ("owner/model", "owner/model"),
        ("./model", "{folder}/model"),
        ("../model", "{parent}/model"),
        (".", "{folder}"),
        ("/models/m", "/models/m"),
        ("~/m", "/home/someone/m"),
    ],
)
def test_a_model_is_a_path_only_when_it_looks_like_one(write_recipe, tmp_path, monkeypatch, written, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write_recipe(
        ("  config:\n    model_type: llama\n    hidden_size: 64\n", f"  model_name_or_path: {written}\n")
    )
    assert load_recipe(path).model.model_name_or_path == expected.format(folder=tmp_path, parent=tmp_path.parent)


def test_the_deepspeed_config_is_a_path_only_when_the_file_exists(write_recipe, tmp_path):
    path = write_recipe(("training:", "deepspeed: {config: ds.json}\ntraining:"))
    assert load_recipe(path).deepspeed.config == "ds.json"
    (tmp_path / "ds.json").write_text("{}")
    assert load_recipe(path).deepspeed.config == f"{tmp_path}/ds.json"


def test_the_folder_of_the_recipe_is_no_pattern(write_recipe, tmp_path):
    folder = tmp_path / "[odd]*"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "a.txt").write_text("x")
    path = write_recipe(name="[odd]*/small.yaml")
    (pattern,) = load_recipe(path).data.sources[0].files
    import glob

    assert glob.glob(pattern) == [str(folder / "texts" / "a.txt")]  # noqa: PTH207 - as the data sources do


def test_the_recipe_dir_reference_is_the_folder_of_the_recipe(write_recipe, tmp_path):
    path = write_recipe(("For the tests", "${recipe_dir}/x"))
    assert load_recipe(path).description == f"{tmp_path}/x"


def test_numbers_as_people_write_them(write_recipe):
    path = write_recipe(("vocab_size: 512", "vocab_size: 1_024"), ("sequence_length: 32", "sequence_length: 0x20"))
    recipe = load_recipe(path)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.tokenizer.train.vocab_size == 1024
    assert recipe.data.sequence_length == 32


def test_a_dumped_recipe_shows_defaults_and_leaves_out_what_is_not_set(write_recipe):
    text = dump_recipe(load_recipe(write_recipe(), ["save_total_limit=null"]))
    assert "  packing: concat\n" in text
    assert "save_total_limit: null\n" in text
    assert "num_train_epochs" not in text
    assert text.index("name:") < text.index("model:") < text.index("training:")


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=8,
)
sources = st.one_of(
    st.builds(
        TextSource,
        type=st.just("text"),
        files=st.lists(plain_text.map("/{}".format), min_size=1, max_size=2).map(tuple),
        exclude=st.lists(plain_text.map("*{}".format), max_size=2).map(tuple),
        text_column=plain_text,
        weight=st.floats(min_value=1e-300, max_value=1e300),
    ),
    st.builds(HubSource, type=st.just("hub"), path=plain_text, revision=st.none() | plain_text),
)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,9}\Z"),
    description=plain_text,
    seed=st.integers(0, 2**63 - 1),
    model=st.builds(
        ModelSection,
        model_name_or_path=st.none(),
        config=st.dictionaries(plain_text, plain_values, max_size=4).map(lambda config: {**config, "model_type": "x"}),
    ),
    tokenizer=st.just(TokenizerSection(tokenizer_name_or_path="gpt2")),
    data=st.builds(
        DataSection,
        sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
        validation_sources=st.just(()),
        validation_fraction=st.floats(0, 1, exclude_max=True),
        sequence_length=st.integers(2, 10**9),
        cache_directory=st.none(),
    ),
    training=st.builds(
        TrainingSection,
        max_steps=st.integers(1, 10**12),
        num_train_epochs=st.none(),
        warmup_steps=st.none(),
        learning_rate=st.floats(min_value=1e-30, max_value=1e30),
        lr_scheduler_type=plain_text,
        lr_scheduler_kwargs=st.dictionaries(plain_text, plain_values, max_size=2),
    ),
    deepspeed=st.just(DeepSpeedSection()),
)


def normal_paths(recipe: Recipe) -> Recipe:
    """Loading normalises paths (`//a` is `/a`); so that a recipe from hypothesis is one that loading can give."""
    import os

    sources = tuple(
        source.model_copy(update={"files": tuple(os.path.normpath(f"/{file.strip('/')}") for file in source.files)})
        if isinstance(source, TextSource)
        else source
        for source in recipe.data.sources
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(recipes)
def test_a_dumped_recipe_loads_to_an_equal_recipe(tmp_path, recipe):
    recipe = normal_paths(recipe)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded == recipe
    assert recipe_hash(loaded) == recipe_hash(recipe)


def test_the_hash_depends_on_content_alone(write_recipe):
    recipe = load_recipe(write_recipe())
    reordered = load_recipe(
        write_recipe(
            ("name: small\ndescription: For the tests\n", "# a comment\ndescription: 'For the tests'\nname: small\n"),
            ("    model_type: llama\n    hidden_size: 64\n", "    hidden_size: 64\n    model_type: llama\n"),
            ("1e-4", "0.0001"),
        )
    )
    assert recipe_hash(recipe) == recipe_hash(reordered)
    assert len(recipe_hash(recipe)) == 32
    assert recipe_hash(recipe) != recipe_hash(load_recipe(write_recipe(), ["seed=43"]))


def test_differences_name_the_field_and_both_values(write_recipe):
    path = write_recipe()
    old = load_recipe(path)
    new = load_recipe(
        path,
        [
            "model.config.hidden_size=256",
            "data.sources.0.weight=2",
            "data.packing=none",
            "max_steps=20",
            "tokenizer.train.vocab_size=1024",
            "preprocessing_num_workers=3",
        ],
    )
    sections = ["model", "tokenizer", "data.sources", "data.preprocessing_num_workers"]
    assert differences(old, new, sections) == [
        "model.config.hidden_size: 64 in the checkpoint, 256 in the recipe",
        "tokenizer.train.vocab_size: 512 in the checkpoint, 1024 in the recipe",
        "data.sources.0.weight: 1.0 in the checkpoint, 2.0 in the recipe",
        "data.preprocessing_num_workers: not set in the checkpoint, 3 in the recipe",
    ]
    assert differences(old, new, ["data.packing"]) == ["data.packing: concat in the checkpoint, none in the recipe"]
    assert differences(old, old, ["model", "data", "training"]) == []


def test_problems_found_later_get_the_lines_of_the_file(write_recipe):
    path = write_recipe()
    loaded = read_recipe(path, ["micro_batch_size=3"])
    problems = [
        Problem("a", "training.max_steps"),
        Problem("b", "training.micro_batch_size"),
        Problem("c", "parallel.tensor_parallel_size"),
        Problem("d", "data.sources.0.files.7"),
        Problem("e", line=99),
    ]
    with pytest.raises(PlanError) as caught, loaded.locating():
        raise PlanError("recipe", problems)
    assert str(caught.value).splitlines() == [
        f"{path}: 5 problems",
        "  line 14  data.sources.0.files.7: d",
        "  line 17  training.max_steps: a",
        "  line 99  e",
        "  training.micro_batch_size: b (override micro_batch_size=3)",
        "  parallel.tensor_parallel_size: c",
    ]


def test_problems_of_another_file_keep_its_name(write_recipe):
    with pytest.raises(RecipeError, match=r"^zero9\.json: 1 problem"), read_recipe(write_recipe()).locating():
        raise RecipeError("zero9.json", [Problem("x", "training.max_steps")])
