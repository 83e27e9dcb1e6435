"""How far preparation is: bars on a terminal, plain lines otherwise, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0


class ProgressReporter:
    """Reports stages of work.

    Args:
        enabled: say anything at all.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.bars = enabled and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Report a fact."""
        if self.enabled:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """Report a stage; the block calls what it gets with each number of units done.

        Args:
            name: what is done.
            total: units of the whole, if known.
            unit: plural name of the units.
        """
        if self.bars:
            with self._bar(name, total, unit) as advance:
                yield advance
        else:
            with self._lines(name, total, unit) as advance:
                yield advance

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)

    @contextmanager
    def _lines(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        started = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                share = f" of {total:,} ({done / total:.0%})" if total else ""
                self.say(f"{name}: {done:,}{share} {unit}, {last - started:.0f} s")

        yield advance
        self.say(f"{name}: {done:,} {unit}, {time.monotonic() - started:.1f} s")
