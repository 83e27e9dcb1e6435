"""Places at which a test ends this process, or lists that it came by.

Nothing here does anything unless a test has put its switch into the environment; no recipe, profile or option can.
"""

import json
import os
import signal
from pathlib import Path

from launcher.checkpoints import fault_plan

SWITCH = "ZEROFLEET_TEST_FAULT"
"""Name of the variable: JSON, either `{"record": FOLDER}` or `{"rank": 0, "point": "commit.renamed", "visit": 1}`.
In a rank's writer process the rank is killed with it, unless the switch says `"writer_only": true`."""

_visits: dict[str, int] = {}
_together: list[int] = []


def killed_with(process: int) -> None:
    """A fault of this process ends another one first: the two are one rank to those who look at checkpoints."""
    _together.append(process)


def reach(point: str) -> None:
    """Say that this process is at a boundary of a write: what stands before it is done, what follows is not begun.

    Args:
        point: name of the boundary, the same in every save.
    """
    fault_plan.enact(point, int(os.environ.get("RANK", "0")), fault_plan.ANY_STEP)
    setting = os.environ.get(SWITCH)
    if setting is not None:
        _act(json.loads(setting), point)


def _act(setting: dict[str, object], point: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if "record" in setting:
        with (Path(str(setting["record"])) / f"rank_{rank}").open("a") as record:
            record.write(point + "\n")
        return
    _visits[point] = _visits.get(point, 0) + 1
    if (rank, point, _visits[point]) == (setting["rank"], setting["point"], setting["visit"]):
        for process in [] if setting.get("writer_only") else _together:
            os.kill(process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
