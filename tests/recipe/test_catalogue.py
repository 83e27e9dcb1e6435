"""The shipped recipes, found in a clone as in an installed wheel."""

from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from launcher.errors import RecipeError, StorageError
from launcher.recipe import catalogue
from launcher.recipe.loading import load_recipe
from launcher.recipe.schema import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["clone", "wheel"])
def shipped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of its own with two recipes, laid out as in a clone and as in a wheel."""
    package = tmp_path / "site" / "launcher"
    package.mkdir(parents=True)
    above = package.parent if request.param == "clone" else package / "_shipped"
    (above / "recipes" / "pretrain").mkdir(parents=True)
    (above / "deepspeed_configs").mkdir()
    (above / "recipes" / "first.yaml").write_text("# zerofleet run first\ndescription: >\n  One\n  two\nname: first\n")
    (above / "recipes" / "pretrain" / "second.yaml").write_text("name: second\n")
    monkeypatch.setattr(catalogue, "_PACKAGE", package)
    catalogue._shipped.cache_clear()
    yield above
    catalogue._shipped.cache_clear()


def test_the_catalogue_is_found_in_a_clone_and_in_a_wheel(shipped: Path):
    assert catalogue.recipes_root() == shipped / "recipes"
    assert catalogue.deepspeed_configs_root() == shipped / "deepspeed_configs"
    first, second = catalogue.list_recipes()
    assert first == catalogue.ShippedRecipe(
        "first", shipped / "recipes" / "first.yaml", "zerofleet run first", "One two"
    )
    assert (second.name, second.command, second.description) == ("pretrain/second", "", "")


def test_a_recipe_is_found_by_name_or_path(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert catalogue.find_recipe("first") == shipped / "recipes" / "first.yaml"
    assert catalogue.find_recipe("pretrain/second.yaml") == shipped / "recipes" / "pretrain" / "second.yaml"
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert catalogue.find_recipe("mine.yaml") == Path("mine.yaml")
    (tmp_path / "first").mkdir()
    assert catalogue.find_recipe("first") == shipped / "recipes" / "first.yaml"
    (tmp_path / "first.yaml").write_text("name: mine\n")
    assert catalogue.find_recipe("first.yaml") == Path("first.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fist", "no such file, and no shipped recipe of this name; did you mean first?"),
        ("second", "did you mean pretrain/second?"),
        ("recipes/pretrain/second.yaml", "did you mean pretrain/second?"),
        ("qqqq", "known here: first, pretrain/second"),
    ],
)
def test_an_unknown_name_gets_a_near_match(shipped: Path, tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        catalogue.find_recipe(name)
    assert str(caught.value).startswith(f"{name}: 1 problem\n")
    assert expected in str(caught.value)
    with pytest.raises(RecipeError, match="no shipped recipe has this name"):
        catalogue.shipped_recipe(name)


def test_a_recipe_is_copied_but_never_over_another_file(shipped: Path, tmp_path: Path):
    target = catalogue.copy_recipe("pretrain/second", tmp_path)
    assert target == tmp_path / "second.yaml"
    assert target.read_text() == "name: second\n"
    assert catalogue.copy_recipe("first", tmp_path / "mine.yaml").read_text().startswith("# zerofleet run first")
    with pytest.raises(StorageError, match=r"second\.yaml exists already; name another file"):
        catalogue.copy_recipe("pretrain/second", tmp_path)
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        catalogue.copy_recipe("first", tmp_path / "no" / "folder.yaml")


def test_this_checkout_ships_recipes_that_its_schema_accepts():
    files = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
    entries = catalogue.list_recipes()
    assert sorted(entry.path for entry in entries) == files
    assert "quickstart" in [entry.name for entry in entries]
    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    for entry in entries:
        assert entry.command.startswith("zerofleet run ")
        assert entry.description
        written = catalogue.read_yaml(entry.path, RecipeError).data
        resolved = load_recipe(entry.name).model_dump(mode="json")
        for document in (written, resolved):
            assert [error.message for error in validator.iter_errors(document)] == []
            assert list(validator.iter_errors({**document, "modle": {}}))
            assert list(validator.iter_errors({**document, "training": {**document["training"], "max_stepz": 1}}))
