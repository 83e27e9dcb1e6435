"""Saving beside the training: what waits, what is skipped, what a dead writer costs, what is left behind."""

import json
from collections.abc import Callable

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.faults import SWITCH
from launcher.checkpoints.manifest import faults_of
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.forked import ForkServer

pytestmark = pytest.mark.distributed

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
SETTINGS = ("max_steps=8", "save_steps=1", "save_total_limit=null", "eval_steps=1000")


def steps(directory: RunDirectory) -> list[int]:
    present = folders.complete(directory.checkpoints)
    for folder in present:
        assert faults_of(folder, contents=True) == []
    return [folders.step_of(folder) for folder in present]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_both_ways_of_saving_leave_the_same_bytes(
    stage: int, fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    contents = []
    for asynchronous in ("true", "false"):
        directory, _ = make_run(*SETTINGS, "max_steps=2", f"zero.stage={stage}", f"asynchronous={asynchronous}",
                                name=f"run-{asynchronous}")  # fmt: skip
        fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        assert steps(directory) == [1, 2]
        files = list(directory.checkpoints.rglob("*.pt"))
        assert len(files) >= 2
        contents.append({str(path.relative_to(directory.checkpoints)): path.stat().st_size for path in files})
    assert contents[0].keys() == contents[1].keys()


def test_a_save_that_comes_meanwhile_waits_and_training_with_it(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run(*SETTINGS)
    results = fork_server.results(
        2, "cases:run_with_held_writer", run_directory=str(directory.path), data=str(prepared.directory),
        hold_at=2, release_at=None,
    )  # fmt: skip
    assert steps(directory) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert results[0]["notices"] == []


def test_what_comes_meanwhile_is_skipped_if_the_recipe_says_so(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run(*SETTINGS, "when_busy=skip", "max_steps=6")
    results = fork_server.results(
        2, "cases:run_with_held_writer", run_directory=str(directory.path), data=str(prepared.directory),
        hold_at=2, release_at=6,
    )  # fmt: skip
    present = steps(directory)
    assert present[-1] == 6, "the last one is never skipped"
    assert not {4, 5} & set(present)
    assert any("the checkpoint at step 5 is skipped" in notice for notice in results[0]["notices"])


def test_a_dead_writer_fails_its_save_and_not_the_training(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run(*SETTINGS, "max_steps=3")
    point = "file.mp_rank_00_model_states.pt.begun"
    fault = {SWITCH: json.dumps({"rank": 0, "point": point, "visit": 2, "writer_only": True})}
    results = fork_server.results(
        2, "cases:run", fault, run_directory=str(directory.path), data=str(prepared.directory)
    )
    assert [result["step"] for result in results] == [3, 3]
    (notice,) = results[0]["notices"]
    assert "checkpoint at step 2 cannot be written" in notice
    assert "the process that writes checkpoints ended with code -9" in notice
    assert "1 of checkpoint.max_failed_saves 3" in notice
    assert steps(directory) == [1, 3]
    assert {path.name for path in directory.checkpoints.iterdir()} == {"latest", "step_00000001", "step_00000003"}
