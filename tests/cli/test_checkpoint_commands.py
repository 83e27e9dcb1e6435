"""`zerofleet checkpoint` on real folders of bytes: what it prints, how it ends, what it leaves behind."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoints import folders
from launcher.cli.main import main
from launcher.orchestration.run_lock import holding
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.run_directory import RunDirectory
from launcher.submit import write_run
from tests.checkpoints.conftest import RECIPE, MakeCheckpoint, checkpoint_in

Zerofleet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.at(tmp_path / "run")
    settings = {"checkpoint": {"save_total_limit": 1}}
    recipe = RECIPE.model_validate({**RECIPE.model_dump(mode="json"), **settings})
    write_run(directory, make_plan(recipe, Resources(workers_per_node=2)))
    return directory


@pytest.fixture
def make(run: RunDirectory) -> MakeCheckpoint:
    return lambda step, **facts: checkpoint_in(run.checkpoints, step, **facts)


@pytest.fixture
def zerofleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zerofleet:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zerofleet", "checkpoint", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def test_ls(run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet) -> None:
    make(10, eval_loss=1.25)
    damaged = make(20)
    os.truncate(damaged / "model.pt", 1)
    code, text, _ = zerofleet("ls", "run")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == ["step", "10", "20"]
    assert "1.2500" in text
    assert "damaged: model.pt: 1 bytes instead of" in text
    code, text, _ = zerofleet("ls", "run", "--json")
    first, second = json.loads(text)
    assert (first["step"], first["eval_loss"], first["faults"]) == (10, 1.25, [])
    assert second["faults"] == ["model.pt: 1 bytes instead of 10,000"]


def test_verify_finds_200_flipped_bits_and_names_each_file(
    run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet
) -> None:
    """Anywhere: in the shards, in the manifest."""
    folder = make(10)
    generator = random.Random(20)
    code, text, _ = zerofleet("verify", "run")
    assert (code, text.startswith("step_00000010: sound")) == (0, True)
    files = sorted(path for path in folder.iterdir())
    weights = [path.stat().st_size for path in files]
    for _ in range(200):
        (path,) = generator.choices(files, weights)
        content = path.read_bytes()
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        code, text, _ = zerofleet("verify", "run", "--json")
        (result,) = json.loads(text)
        assert code == 2
        assert [fault.partition(":")[0].split()[0] for fault in result["faults"]] == [path.name], (path, place, bit)
        path.write_bytes(content)
    assert zerofleet("verify", "run", "--step", "10")[0] == 0


def test_inspect(run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet) -> None:
    make(10)
    make(20)
    code, text, _ = zerofleet("inspect", "run", "--step", "10")
    assert code == 0
    for fact in ("10, 80 samples into the data", "2 workers, data-parallel 2", "stage 2, fp32", "optim_1.pt"):
        assert fact in text
    code, text, _ = zerofleet("inspect", "run", "--json")
    assert json.loads(text)["step"] == 20


def test_pin_prune_and_unpin(run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet) -> None:
    for step in (10, 20, 30):
        make(step)
    assert zerofleet("pin", "run", "--step", "10") == (0, "step_00000010 is kept until you unpin it\n", "")
    assert zerofleet("prune", "run") == (0, "deleted: step_00000020\n", "")
    assert json.loads(zerofleet("unpin", "run", "--step", "10", "--json")[1]) == {"unpinned": "step_00000010"}
    assert json.loads(zerofleet("prune", "run", "--json")[1]) == {"deleted": ["step_00000010"]}
    assert zerofleet("prune", "run") == (0, "deleted: nothing\n", "")
    assert [folder.name for folder in folders.complete(run.checkpoints)] == ["step_00000030"]


def test_save_needs_a_run_at_work(run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet) -> None:
    code, _, error = zerofleet("save", "run")
    assert code == 2
    assert "no run is at work in" in error
    with holding(run):
        code, _, error = zerofleet("save", "run", "--timeout", "0.2")
    assert code == 2
    assert "did not answer within" in error
    assert not run.save_request.exists()


def test_convert_refuses_a_run_at_work_and_what_is_damaged(
    run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet
) -> None:
    folder = make(10)
    with holding(run):
        code, _, error = zerofleet("convert", "run")
    assert code == 2
    assert "is in use by process" in error
    os.truncate(folder / "model.pt", 1)
    code, _, error = zerofleet("convert", "run")
    assert code == 2
    assert "is damaged: model.pt: 1 bytes" in error


@pytest.mark.parametrize("command", ["ls", "verify", "inspect", "pin", "unpin", "prune", "save", "convert"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path, zerofleet: Zerofleet) -> None:
    code, _, error = zerofleet(command, "nowhere")
    assert code == 2
    assert "nowhere is no run directory: neither nowhere/plan.json nor runs/nowhere/plan.json exists" in error


@pytest.mark.parametrize("command", ["verify", "inspect", "pin", "unpin", "convert"])
def test_a_step_that_is_not_there_is_refused(
    command: str, run: RunDirectory, make: MakeCheckpoint, zerofleet: Zerofleet
) -> None:
    make(10)
    code, _, error = zerofleet(command, "run", "--step", "11")
    assert (code, error.strip()) == (2, "no complete checkpoint of step 11; there are steps 10")
    shutil.rmtree(run.checkpoints)
    assert zerofleet(command, "run", "--step", "10")[0] == 2
