"""Who is told about a run while it runs; here, the observer of a job, which nobody watches live."""

import json
import os
import sys
import time
from typing import Any, Protocol

from cluster.types import PHASES_VARIABLE
from launcher.orchestration.progress import Pace, phase_table, progress_line, render_phases
from launcher.orchestration.states import GroupStatus, RunState
from launcher.run_directory import RunDirectory, write_atomically

PROGRESS_FILE_INTERVAL_S = 1.0
LINE_INTERVAL_S = 10.0


class Observer(Protocol):
    """Whoever shows a run to a person."""

    def event(self, state: RunState, facts: dict[str, Any]) -> None:
        """The run changed its state."""
        ...

    def message(self, text: str) -> None:
        """Something to know, a line."""
        ...

    def progress(self, status: GroupStatus) -> None:
        """A look at the workers; called about twice a second."""
        ...


class JobObserver:
    """Writes lines to stdout, which is the job's log, and `progress.json`, which `attach` and `status` read."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self.run_directory = run_directory
        self.pace = Pace()
        self.moments: dict[str, float] = json.loads(os.environ.get(PHASES_VARIABLE, "{}"))
        self.state = RunState.STARTING
        self.attempt = 0
        self._written = 0.0
        self._line_at = 0.0
        self._line_metrics: dict[str, Any] = {}

    def event(self, state: RunState, facts: dict[str, Any]) -> None:
        """Write the state and its facts."""
        self.state, self.attempt = state, facts.get("attempt", self.attempt)
        self.moments.setdefault(state.value, time.time())
        self.message(f"{state.value} {json.dumps(facts, default=str)}")

    def message(self, text: str) -> None:
        """Write the line."""
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stdout.flush()

    def progress(self, status: GroupStatus) -> None:
        """Write how far rank 0 is."""
        beat = status.beats.get(0)
        if beat is None or (time.monotonic() - self._written < PROGRESS_FILE_INTERVAL_S and not self.state.is_final):
            return
        self._written = time.monotonic()
        if "first_step" in beat.timeline and "first_step" not in self.moments:
            self.moments.update({name: moment for name, moment in beat.timeline.items() if name not in self.moments})
            self.message(f"the first step is made; it took\n{render_phases(phase_table(self.moments))}")
        remaining = self.pace.remaining(time.monotonic(), beat.step, beat.max_steps)
        facts = {
            "time": time.time(),
            "state": self.state.value,
            "attempt": self.attempt,
            "step": beat.step,
            "max_steps": beat.max_steps,
            "phase": beat.phase.value,
            "metrics": beat.metrics,
            "seconds_remaining": remaining,
            "moments": self.moments,
        }
        write_atomically(self.run_directory.progress, json.dumps(facts))
        if beat.metrics != self._line_metrics and time.monotonic() - self._line_at >= LINE_INTERVAL_S:
            self._line_at, self._line_metrics = time.monotonic(), beat.metrics
            self.message(progress_line(beat.step, beat.max_steps, beat.metrics, beat.phase.value, remaining))


class Notices:
    """Shows each notice of a worker once."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._shown: dict[tuple[int, int], int] = {}

    def show(self, attempt: int, status: GroupStatus) -> None:
        """Show what is new in a look at an attempt's workers."""
        for rank, beat in status.beats.items():
            seen = self._shown.get((attempt, rank), 0)
            for text in beat.notices[seen:]:
                self.observer.message(text)
            self._shown[attempt, rank] = len(beat.notices)
