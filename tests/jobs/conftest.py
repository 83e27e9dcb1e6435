"""What the tests of jobs share: waiting, and whether a job left processes behind."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.types import JOB_VARIABLE


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60, every: float = 0.1) -> Any:
    """Poll until the condition gives something true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"no {what} within {timeout} s")


def processes_of(run_directory: Path) -> list[str]:
    """Command lines of all processes that were started for the jobs of a run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(JOB_VARIABLE, "").startswith(f"{run_directory}/"):
                found.append(" ".join(process.cmdline())[:200])
    return found


def assert_nothing_left(run_directory: Path) -> None:
    """No process of the run's jobs is left on any node."""
    wait_for(lambda: not processes_of(run_directory), f"end of the processes of {run_directory}", timeout=10)
