"""What makes a run save besides its steps: the clock, a person's request. Rank 0 decides, all ranks agree."""

import time
from collections.abc import Callable

from launcher.checkpoints.requests import Answer, Inbox
from launcher.recipe.run_sections import CheckpointSection
from launcher.run_directory import RunDirectory


class SaveTriggers:
    """Rank 0's view of the clock and of the inbox; on other ranks nothing makes one.

    Args:
        run_directory: of the run.
        section: `checkpoint` of the recipe.
        clock: seconds, monotonic.
    """

    def __init__(
        self, run_directory: RunDirectory, section: CheckpointSection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inbox = Inbox(run_directory)
        self._interval = None if section.save_minutes is None else section.save_minutes * 60
        self._clock = clock
        self._last = clock()
        self._request: str | None = None

    def due(self) -> bool:
        """Whether the step that begins now should end with a save."""
        self._request = self._request or self._inbox.look()
        late = self._interval is not None and self._clock() - self._last >= self._interval
        return late or self._request is not None

    @property
    def reason(self) -> str:
        """Why a save is due."""
        return "interval" if self._request is None else "request"

    def begun(self) -> None:
        """A save, whatever its reason, has begun."""
        self._last = self._clock()

    def ended(self, step: int, reason: str, *, saved: bool) -> None:
        """A save at this step has succeeded or failed."""
        if self._request is not None and reason != "interval":
            self._inbox.answer(Answer(self._request, step, saved))
            self._request = None
