"""The account of a run's time as TensorBoard scalars, in an event file of the driver's own."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.orchestration.accounting import Account


class GoodputBoard:
    """Writes `goodput/...` scalars; a folder of its own, because TensorBoard reads one live event file a folder.

    Args:
        folder: for the event file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def draw(self, step: int, account: Account) -> None:
        """Write the goodput and the share of each part of the allocated time, as of a step."""
        if account.goodput is None:
            return
        shares = {name: seconds / account.allocated for name, seconds in account.groups.items() if name != "queue"}
        values = {f"goodput/{name.replace(' ', '_')}": share for name, share in shares.items()}
        self.scalars(step, {"goodput/goodput": account.goodput, **values})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers, by tag, as of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self.folder))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
