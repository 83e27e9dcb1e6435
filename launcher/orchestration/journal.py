"""The run's own records: events, attempts, and the ledger of the running attempt."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.orchestration.accounting import (
    ATTEMPT_ENDS,
    INTERRUPTED,
    RECORDS,
    RESUMED,
    STRAGGLER,
    Account,
    Ledger,
    account,
)
from launcher.orchestration.detection import Straggler
from launcher.orchestration.goodput_board import GoodputBoard
from launcher.orchestration.observers import Observer
from launcher.orchestration.states import GroupStatus, RunState
from launcher.run_directory import RunDirectory, append_json_line, read_json_lines, write_atomically

LEDGER_INTERVAL_S = 5.0
"""How often the running attempt's ledger is written: what a driver that is killed leaves to its successor."""


class Journal:
    """Writes what happens in a run to its directory, and tells the observer.

    Args:
        run_directory: of the run.
        observer: told every event.
        tensorboard: whether the goodput is drawn.
        clock: Unix time.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        observer: Observer,
        *,
        tensorboard: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run_directory = run_directory
        self.observer = observer
        self.clock = clock
        self._started = clock()
        self._ledger: Ledger | None = None
        self._ledger_at = 0.0
        self._attempt: dict[str, Any] = {}
        self._board = GoodputBoard(run_directory.tensorboard / "goodput") if tensorboard else None
        self._close_predecessor()

    def _close_predecessor(self) -> None:
        """A driver that was killed wrote no end of its attempt; its last ledger says how far it was."""
        events = read_json_lines(self.run_directory.events)
        if not events or not _is_open(events):
            return
        ledger = _read_json(self.run_directory.ledger)
        number = events[-1].get("attempt", 0)
        begun = max((event["time"] for event in events if event["state"] == RunState.RUNNING), default=0.0)
        known = ledger if ledger is not None and ledger["attempt"] == number and ledger["time"] >= begun else None
        facts = {"attempt": number, "reason": "the driver ended without a word", "found": round(self.clock(), 3)}
        facts |= {"ledger": known["ledger"]} if known else {}
        last = events[-1]["time"]
        moment = max(last, known["time"]) if known else last
        self._append(self.run_directory.events, {"time": moment, "state": INTERRUPTED, **facts})

    def starting(self, moments: Mapping[str, float], facts: dict[str, Any]) -> None:
        """The driver begins to start workers; with it, the moments of its job."""
        self.event(RunState.STARTING, {**facts, "driver_started": round(self._started, 3), "moments": dict(moments)})

    def event(self, state: RunState, facts: dict[str, Any]) -> None:
        """Record a change of state."""
        now = round(self.clock(), 3)
        if state is RunState.RUNNING:
            self._attempt = {"attempt": facts["attempt"], "started": now, "workers": facts.get("workers", [])}
            self._ledger = None
        record: dict[str, Any] = {"time": now, "state": state.value, **facts}
        if self._attempt and state in ATTEMPT_ENDS and self._ledger is not None:
            record["ledger"] = self._ledger.as_json()
        self._append(self.run_directory.events, record)
        self.observer.event(state, facts)
        if self._attempt and state in ATTEMPT_ENDS:
            outcome = {"ended": now, "outcome": state.value, "facts": facts}
            self._append(self.run_directory.attempts, {**self._attempt, **outcome})
            self._attempt = {}
        if state.is_final:
            self._draw()

    def straggler(self, straggler: Straggler) -> None:
        """Record a slow rank, and tell the observer."""
        record = {"time": round(self.clock(), 3), "state": STRAGGLER, "message": str(straggler), **asdict(straggler)}
        self._append(self.run_directory.events, record)
        self.observer.message(str(straggler))
        if self._board is not None:
            self._board.scalars(straggler.step, {f"stragglers/rank_{straggler.rank}": straggler.factor})

    def look(self, status: GroupStatus) -> None:
        """Note what a look at the workers says of the time."""
        beat = status.beats.get(0)
        if beat is None or not self._attempt:
            return
        self._ledger = Ledger.of(beat)
        if beat.from_memory is not None and "from_memory" not in self._attempt:
            self._attempt["from_memory"] = beat.from_memory
            facts = {"attempt": self._attempt["attempt"], "from": "memory", "step": beat.from_memory}
            self._append(self.run_directory.events, {"time": round(self.clock(), 3), "state": RESUMED, **facts})
        if self.clock() - self._ledger_at >= LEDGER_INTERVAL_S:
            self._ledger_at = self.clock()
            record = {"time": round(self.clock(), 3), "attempt": self._attempt["attempt"]}
            try:
                write_atomically(self.run_directory.ledger, json.dumps({**record, "ledger": self._ledger.as_json()}))
            except OSError as error:
                self.observer.message(f"{self.run_directory.ledger.name} cannot be written: {error.strerror}")
            self._draw()

    def _draw(self) -> None:
        if self._board is not None and self._ledger is not None:
            self._board.draw(self._ledger.step, read_account(self.run_directory))

    def close(self) -> None:
        """Close what is open."""
        if self._board is not None:
            self._board.close()

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """Record a fact; a full disk must not keep the run from ending as it should, so it is only said."""
        try:
            append_json_line(path, record)
        except OSError as error:
            self.observer.message(f"{path.name} cannot be written: {error.strerror}")


def read_account(run_directory: RunDirectory) -> Account:
    """Where a run's time went, as its directory says; up to now when it runs."""
    return account(read_json_lines(run_directory.events), _read_json(run_directory.ledger))


def _is_open(events: Sequence[Mapping[str, Any]]) -> bool:
    states = [event["state"] for event in events if event["state"] not in RECORDS]
    return states[-1] != INTERRUPTED and not RunState(states[-1]).is_final


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content
