"""What the tests of faults share: cells, places at which a test acts from outside, and what must be true afterwards."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.orchestration.journal import read_account
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import wait_for

SAVE_STEPS = 25
LENGTH = 150
PLACES = (
    ("phase.engine", 1, None),
    ("phase.data", 1, 17),
    ("phase.forward", 0, 38),
    ("phase.backward", 1, 61),
    ("phase.save", 0, 75),
    ("commit.renamed", 0, None),
    ("phase.evaluate", 1, 100),
)
"""All over a run: where in a worker's life, which rank, after how many steps (None: the first time)."""
SETTINGS = (
    # A save beside the training may take a second interval with it: tests/training/test_checkpoint_kills.py.
    *(f"save_steps={SAVE_STEPS}", "asynchronous=false"),
    *("eval_steps=50", "max_restarts=20", "max_start_failures=20"),
    *("restart_delay_seconds=0", "exclude_node_after=null"),
)


@dataclass(frozen=True)
class Cell:
    """A fault at a place.

    Attributes:
        fault: what happens.
        point: where in a worker's life: `phase.forward`, `commit.renamed`, ...
        rank: which worker comes there.
        step: after how many optimizer steps; within a commit: at which of this process's; None: the first time.
    """

    fault: str
    point: str
    rank: int = 1
    step: int | None = None


def names(chain: Sequence[Cell]) -> str:
    """Id of a test."""
    return "-".join(f"{cell.fault}@{cell.point}" for cell in chain)


@dataclass(frozen=True)
class Moments:
    """Places at which workers stop and wait until the test has done something from outside; each once in a run.

    Attributes:
        plan: the file of the plan of faults; its entries are the places.
    """

    plan: Path

    @classmethod
    def of(cls, chain: Sequence[Cell], folder: Path) -> "Moments":
        """Have the workers stop where the cells lie."""
        moments = cls(folder / "faults.json")
        entries = [{"fault": "mark", "point": c.point, "rank": c.rank, "step": c.step} for c in chain]
        moments.plan.write_text(json.dumps(entries))
        return moments

    def next(self, known: Sequence[int], timeout: float = 90) -> int:
        """Wait until a worker stands at a place other than the known ones; returns the place's index."""

        def reached() -> list[int]:
            numbers = (path.name.removeprefix(f"{self.plan.name}.") for path in self.plan.parent.glob("faults.json.*"))
            return [int(number) for number in numbers if number.isdigit() and int(number) not in known]

        return int(wait_for(reached, "worker at a place of the plan", timeout)[0])

    def release(self, index: int) -> None:
        """Let it go on."""
        Path(f"{self.plan}.{index}.go").touch()


def incidents(directory: RunDirectory) -> list[dict[str, Any]]:
    """The failures that the run has noticed."""
    return [event for event in read_json_lines(directory.events) if event["state"] == "recovering"]


def steps_made_again(directory: RunDirectory) -> list[int]:
    """How many steps were made a second time, fault by fault; none for one that came right after a save."""
    steps = [record["step"] for record in read_json_lines(directory.logs / "samples_00000.jsonl")]
    return [before - after + 1 for before, after in itertools.pairwise(steps) if after <= before]


def check_account(directory: RunDirectory) -> None:
    """Every second is accounted for."""
    account = read_account(directory)
    assert sum(account.seconds.values()) == pytest.approx(account.wall, rel=0.01)
