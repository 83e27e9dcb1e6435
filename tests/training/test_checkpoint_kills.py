"""SIGKILL at every boundary of a write: the next run continues from a verified checkpoint, one interval back at most.

The boundaries are listed by a run that passes them (launcher/checkpoints/faults.py), not sampled by time. One run then
meets all of them, one an attempt, and must end exactly as the run that nobody killed.
"""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.faults import SWITCH
from launcher.checkpoints.manifest import faults_of
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support.forked import ForkServer

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
Boundary = tuple[int, str, int]
"""Rank, name of the boundary, and the how-manieth time in one save that the rank comes by."""
POINTS = 30
EVERY_ASYNCHRONOUS = 3
"""The files are written as in a synchronous save, whose every boundary is met; of those beside the training, a part,
but all with --exhaustive."""
INTERVAL = 2


def losses(directory: RunDirectory) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r}


def newest_step(directory: RunDirectory) -> int:
    present = folders.complete(directory.checkpoints)
    return folders.step_of(present[-1]) if present else 0


def boundaries(record: Path) -> list[Boundary]:
    """Every boundary that the last save of a recorded run passed, rank by rank."""
    found = []
    for rank in (0, 1):
        points = (record / f"rank_{rank}").read_text().splitlines()
        begins = max(index for index, point in enumerate(points) if point == points[0])
        counts: Counter[str] = Counter()
        for point in points[begins:]:
            counts[point] += 1
            found.append((rank, point, counts[point]))
    assert len(set(found)) == len(found)
    return found


class Killed:
    """A run that is started again and again, and killed at a given boundary each time."""

    def __init__(self, fork_server: ForkServer, directory: RunDirectory, data: Path, may_lose: int = INTERVAL) -> None:
        self.fork_server, self.directory, self.data, self.may_lose = fork_server, directory, data, may_lose

    def run(self, environment: dict[str, str]) -> list[dict[str, Any]]:
        path = str(self.directory.path)
        return self.fork_server.run(2, "cases:run", environment, run_directory=path, data=str(self.data))

    def attempt(self, boundary: Boundary) -> None:
        rank, point, visit = boundary
        before = newest_step(self.directory)
        outcomes = self.run({SWITCH: json.dumps({"rank": rank, "point": point, "visit": visit})})
        assert outcomes[rank] == {"signal": signal.SIGKILL}, f"{boundary} was not reached: {outcomes}"
        # A recorded save may begin before the commit of the one before it, which then passes the boundary too.
        assert newest_step(self.directory) - before in range(0, visit * INTERVAL + 1, INTERVAL), boundary
        done = max(losses(self.directory))
        assert done - newest_step(self.directory) <= self.may_lose, boundary
        for folder in folders.complete(self.directory.checkpoints):
            assert faults_of(folder, contents=True) == [], boundary
        assert len(folders.complete(self.directory.checkpoints)) >= (1 if before else 0), boundary


def record(fork_server: ForkServer, directory: RunDirectory, data: Path, folder: Path) -> list[Boundary]:
    folder.mkdir()
    Killed(fork_server, directory, data).run({SWITCH: json.dumps({"record": str(folder)})})
    return boundaries(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "asynchronous"), [(1, False), (2, False), (3, False), (2, True)], ids=["1", "2", "3", "2-asynchronous"]
)
def test_a_kill_at_any_boundary_of_a_save_loses_one_interval_at_most(
    stage: int,
    asynchronous: bool,
    fork_server: ForkServer,
    make_run: MakeRun,
    prepared: PreparedData,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """Beside the training, that is one interval besides the one in host memory."""
    settings = (f"zero.stage={stage}", f"save_steps={INTERVAL}", "save_total_limit=1", "eval_steps=1000")
    settings += (f"asynchronous={asynchronous}",)
    seen, _ = make_run(*settings, f"max_steps={2 * INTERVAL}", name="seen")
    points = record(fork_server, seen, prepared.directory, tmp_path / "points")
    assert len(points) >= POINTS
    points = points[:: EVERY_ASYNCHRONOUS if asynchronous and not pytestconfig.getoption("exhaustive") else 1]
    settings = (*settings, f"max_steps={INTERVAL * (len(points) + 2)}")
    whole, _ = make_run(*settings, name="whole")
    assert all("result" in outcome for outcome in Killed(fork_server, whole, prepared.directory).run({}))
    parts, _ = make_run(*settings, name="parts")
    killed = Killed(fork_server, parts, prepared.directory, INTERVAL * (2 if asynchronous else 1))
    for boundary in points:
        killed.attempt(boundary)
    outcomes = killed.run({})
    assert [outcome["result"]["status"] for outcome in outcomes] == ["complete"] * 2
    assert losses(parts) == losses(whole)
    names = {path.name for path in parts.checkpoints.iterdir()}
    assert names == {"latest", folders.complete(parts.checkpoints)[-1].name}, "nothing is left behind"


@pytest.mark.distributed
def test_a_kill_while_tidying_up_after_a_kill(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData, tmp_path: Path
) -> None:
    settings = (f"save_steps={INTERVAL}", "save_total_limit=1", f"max_steps={10 * INTERVAL}", "eval_steps=1000")
    settings += ("asynchronous=false",)
    directory, _ = make_run(*settings)
    killed = Killed(fork_server, directory, prepared.directory)
    in_the_middle = (0, "rank_00000.replaced", 1)
    tidied = [(0, f"tidy.{point}", visit) for point, visit in [("begins", 1), ("renamed", 1), ("file", 2), ("done", 1)]]
    for boundary in tidied:
        killed.attempt(in_the_middle)
        assert (directory.checkpoints / f"{folders.folder_name(INTERVAL)}.incomplete").is_dir()
        killed.attempt(boundary)
    assert newest_step(directory) == 0
    assert all("result" in outcome for outcome in killed.run({}))
    assert newest_step(directory) == 10 * INTERVAL
