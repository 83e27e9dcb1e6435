"""What the documents tell a reader to type works as it is written there, and their links lead somewhere."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.documents import ON_SLURM, ROOT, blocks, commands
from tests.support.unmeasured import unmeasured_environment

DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
BIN = Path(sys.executable).parent
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **unmeasured_environment(),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "ZEROFLEET_CACHE": str(folder / "cache"),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    environment.pop("RAY_ADDRESS", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def run(command: str, folder: Path) -> str:
    with start(command, folder) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, f"{command}\n{output}"
    return output


@pytest.mark.parametrize(
    ("document", "count"), [("README.md", 2), ("CONTRIBUTING.md", 3)], ids=["README.md", "CONTRIBUTING.md"]
)
def test_make_targets_exist(document: str, count: int) -> None:
    targets = [command.split()[1] for command in commands(document) if command.startswith("make ")]
    assert len(targets) == count
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


BENCHMARKS = [c for document in DOCUMENTS for c in commands(document) if c.startswith("python ")]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_know_their_options(command: str) -> None:
    done = subprocess.run([sys.executable, *command.split()[1:], "--help"], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"--json" in done.stdout


@pytest.mark.ray
@pytest.mark.distributed
def test_every_zerofleet_command_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "my-recipe.yaml").write_text(recipe)
    (tmp_path / "texts").mkdir()
    library = Path(os.__file__).parent
    for module in (library / "json").glob("*.py"):
        shutil.copy(module, tmp_path / "texts" / f"{module.stem}.txt")
    elsewhere = commands("README.md", ON_SLURM)
    seen = [c for c in commands("README.md") if c.startswith("zerofleet ") and c not in elsewhere]
    assert len(seen) >= 9
    for command in seen:
        if command.startswith("zerofleet tensorboard "):
            check_tensorboard(command, tmp_path)
        else:
            run(command, tmp_path)
    assert (tmp_path / "my-model" / "model.safetensors").exists()
    assert "my-recipe is complete already" in run("zerofleet run my-recipe.yaml training.max_steps=80", tmp_path)
    assert (tmp_path / "recipe.schema.json").read_text().startswith("{")


def check_tensorboard(command: str, folder: Path) -> None:
    """TensorBoard serves until it is ended; on another port, because the usual one may be taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start(f"{command} --port {port}", folder) as process:
        try:
            runs = b""
            deadline = time.monotonic() + 90
            while not runs and time.monotonic() < deadline and process.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=5) as page:
                        runs = page.read()
                except OSError:
                    time.sleep(0.5)
        finally:
            process.terminate()
            output, _ = process.communicate(timeout=30)
    assert b"train/loss" in runs, output


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_is_one_that_is_checked(document: str) -> None:
    known = ("make ", "zerofleet ", "python benchmarks/", ". .venv/bin/activate")
    assert [command for command in commands(document) if not command.startswith(known)] == []


def test_links_lead_to_files() -> None:
    links = [(document, link) for document in DOCUMENTS for link in LINK.findall((ROOT / document).read_text())]
    assert len(links) >= 3
    assert [(document, link) for document, link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
