"""A plan of faults that workers bring upon themselves, for tests of what happens then.

Nothing here does anything unless a test has put its switch into the driver's environment; no recipe and no option can.
The plan is a JSON list of `{"fault": ..., "point": ..., "rank": ..., "step": ...}`: at which place in a worker's life,
on which rank (null: all), after how many optimizer steps (null: at any; within a save: at which visit). Each entry
happens once in a run, over all its attempts; only `slow` goes on, for `steps` steps if that is given, and what has
`"always": true`.
"""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

SWITCH = "ZEROFLEET_TEST_FAULT_PLAN"
"""Name of the variable that holds the plan's path."""
MARK_TIMEOUT_S = 300.0
ANY_STEP = -1
"""Step of a point within a save, which does not know the step; an entry counts the times it comes by instead."""

_visits: dict[int, int] = {}


class InjectedError(RuntimeError):
    """The exception that a plan asks for."""


def environment() -> dict[str, str]:
    """What the driver hands on to its workers: the switch, if a test has set it for the driver."""
    return {SWITCH: os.environ[SWITCH]} if SWITCH in os.environ else {}


def enact(point: str, rank: int, step: int) -> None:
    """Do what the plan has for this moment.

    Args:
        point: `phase.forward`, `commit.renamed`, ...
        rank: of this worker.
        step: optimizer steps that it has completed.
    """
    path = os.environ.get(SWITCH)
    if path is None:
        return
    for index, entry in enumerate(_read(path)):
        if entry["point"] == point and entry["rank"] in (rank, None):
            _visits[index] = _visits.get(index, 0) + 1
            _consider(Path(f"{path}.{index}"), entry, _visits[index] if step == ANY_STEP else step)


def spoiled(rank: int, step: int) -> bool:
    """Whether the plan makes this step's loss NaN; once, so that the step may be made again with other samples."""
    path = os.environ.get(SWITCH)
    return path is not None and any(
        entry["fault"] == "nan" and entry["rank"] == rank and entry["step"] == step and _first(Path(f"{path}.{index}"))
        for index, entry in enumerate(_read(path))
    )


def _read(path: str) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = json.loads(Path(path).read_bytes())
    return plan


def _consider(mark: Path, entry: dict[str, Any], step: int) -> None:
    wanted = entry.get("step")
    if entry["fault"] == "slow":
        if wanted is None or wanted <= step < wanted + entry.get("steps", math.inf):
            time.sleep(entry["seconds"])
    elif (wanted is None or step == wanted) and (entry.get("always") or _first(mark)):
        _do(mark, entry)


def _first(mark: Path) -> bool:
    """Whether nobody has come here before, in this attempt or an earlier one."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _do(mark: Path, entry: dict[str, Any]) -> None:
    fault = entry["fault"]
    if fault == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "sigstop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "exit":
        os._exit(1)
    elif fault == "exception":
        raise InjectedError(f"the plan of faults asks for an exception in {entry['point']}")
    elif fault == "memory":
        bytearray(1 << 62)
    elif fault == "mark":
        _await_release(Path(f"{mark}.go"))
    else:
        raise ValueError(f"a plan of faults knows no {fault!r}")


def _await_release(go: Path) -> None:
    """Wait while the test does something from outside: cut a cable, kill a raylet, fill a disk."""
    deadline = time.monotonic() + MARK_TIMEOUT_S
    while not go.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
