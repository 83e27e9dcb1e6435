"""The wheel holds everything that a clone offers to a user."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("zerofleet-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def zerofleet(site: Path, *arguments: str) -> str:
    """Run the command from an unpacked wheel, in a folder that is no clone."""
    found = f"import launcher; assert launcher.__file__.startswith({str(site)!r})"
    script = f"{found}; from launcher.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_recipes_are_in_the_wheel(installed: Path) -> None:
    recipes = json.loads(zerofleet(installed, "recipes", "ls", "--json"))
    in_clone = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.yaml")
    }
    assert "quickstart" in in_clone
    assert {recipe["name"] for recipe in recipes} == in_clone
    assert all(recipe["path"].startswith(str(installed)) for recipe in recipes)


def test_a_shipped_recipe_is_planned_from_the_wheel(installed: Path) -> None:
    """This reads a recipe, a profile, a DeepSpeed config, and the tables of known keys."""
    plan = json.loads(zerofleet(installed, "plan", "quickstart", "--json"))
    assert plan["deepspeed_config"]["zero_optimization"]["stage"] == plan["zero_stage"]


def test_every_file_of_the_packages_is_in_the_wheel(installed: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--", "launcher", "cluster"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(tracked) > 50
    assert [name for name in tracked if (ROOT / name).exists() and not (installed / name).exists()] == []
