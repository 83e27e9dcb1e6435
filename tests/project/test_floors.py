"""The contracts in pyproject.toml notice what they are there for, and the pure floors stay pure when imported."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher

ROOT = Path(__file__).resolve().parents[2]

BREACHES = {
    "floors": ("launcher/errors.py", "import launcher.planning.plan"),
    "cluster-floors": ("cluster/errors.py", "import cluster.profile"),
    "acyclic": ("launcher/recipe/schema.py", "import launcher.recipe.loading"),
    "seam": ("cluster/local.py", "import launcher.errors"),
    "one-door": ("launcher/cli/live.py", "import cluster.local"),
    "pure-floors": ("launcher/planning/layout.py", "import torch"),
    "thin-cli": ("launcher/cli/live.py", "import ray"),
    "decisions": ("launcher/orchestration/supervisor.py", "import ray"),
    "step-path": ("launcher/training/loop.py", "import ray"),
}
"""Contract -> a file, and a line in it that breaks the contract."""

HEAVY = ("torch", "deepspeed", "ray", "transformers", "tokenizers", "datasets", "tensorboard")

PURE = (
    "recipe",
    "planning",
    "checkpoints",
    "cli",
    "jobs",
    "submit",
    "provenance",
    "run_directory",
    "errors",
    "orchestration.driver",
)
"""What `zerofleet plan` and `--help` import: these and all that lies below them must bring in nothing heavy."""


def lint_imports(folder: Path, contract: str) -> subprocess.CompletedProcess[str]:
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", script, "--no-logo", "--no-cache", "--contract", contract]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floors")
    for package in ("launcher", "cluster"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("contract", BREACHES)
def test_each_contract_holds_and_notices_a_breach(copy: Path, contract: str) -> None:
    file, line = BREACHES[contract]
    kept = lint_imports(copy, contract)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    source = (copy / file).read_text()
    try:
        (copy / file).write_text(f"{source}\n{line}\n")
        broken = lint_imports(copy, contract)
    finally:
        (copy / file).write_text(source)
    assert broken.returncode == 1
    assert "0 kept, 1 broken" in broken.stdout


def modules_below(name: str) -> list[str]:
    path = ROOT / "launcher" / name.replace(".", "/")
    inside = [module.name for module in pkgutil.iter_modules([str(path)])] if path.is_dir() else []
    return [f"{launcher.__name__}.{name}", *(f"{launcher.__name__}.{name}.{module}" for module in inside)]


@pytest.mark.parametrize("name", PURE)
def test_importing_a_pure_floor_brings_nothing_heavy(name: str) -> None:
    modules = modules_below(name)
    script = f"import sys, {', '.join(modules)}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
