"""Asking a running training for a checkpoint, through two small files in its run directory."""

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import CheckpointError
from launcher.run_directory import RunDirectory, write_atomically

LOOK_INTERVAL_S = 1.0
"""How often rank 0 looks for a request: a file system that is far away should not slow the steps down."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        request: its id.
        step: the optimizer step that was saved, or should have been.
        saved: whether it was.
    """

    request: str
    step: int
    saved: bool


def ask(run_directory: RunDirectory) -> str:
    """Ask for a checkpoint; returns the request's id. A request that is waiting already is joined."""
    waiting = _read(run_directory.save_request)
    if waiting is not None:
        return waiting
    request = secrets.token_hex(8)
    write_atomically(run_directory.save_request, json.dumps({"request": request, "time": time.time()}))
    return _read(run_directory.save_request) or request


def ask_and_wait(run_directory: RunDirectory, timeout_s: float) -> Answer:
    """Ask for a checkpoint and wait until the run has answered; a request that nobody answers is taken back.

    Raises:
        CheckpointError: nobody answered in time.
    """
    request = ask(run_directory)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            answer = Answer(**json.loads(run_directory.save_answer.read_bytes()))
        except (OSError, ValueError, TypeError):
            answer = None
        if answer is not None and answer.request == request:
            return answer
        time.sleep(0.1)
    run_directory.save_request.unlink(missing_ok=True)
    raise CheckpointError(
        f"the run in {run_directory.path} did not answer within {timeout_s:.0f} s; it looks for requests between two "
        "steps, so a long step or an evaluation may delay it"
    )


class Inbox:
    """Rank 0's side.

    Args:
        run_directory: of the run.
    """

    def __init__(self, run_directory: RunDirectory) -> None:
        self.run_directory = run_directory
        self._looked = -LOOK_INTERVAL_S

    def look(self) -> str | None:
        """The id of a waiting request, if a look is due and there is one."""
        if time.monotonic() - self._looked < LOOK_INTERVAL_S:
            return None
        self._looked = time.monotonic()
        return _read(self.run_directory.save_request)

    def answer(self, answer: Answer) -> None:
        """Say what became of the request, and make room for the next."""
        write_atomically(self.run_directory.save_answer, json.dumps(asdict(answer)))
        if _read(self.run_directory.save_request) == answer.request:
            self.run_directory.save_request.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_bytes())["request"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
