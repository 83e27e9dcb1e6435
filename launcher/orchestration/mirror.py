"""Copying checkpoints to `checkpoint.directory` while the run goes on, in the driver, where nothing is trained."""

import threading
from collections.abc import Callable
from pathlib import Path

from launcher.checkpoints import folders
from launcher.checkpoints.remote import RemoteCheckpoints
from launcher.errors import ExpectedError
from launcher.recipe.run_sections import CheckpointSection

LOOK_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 30.0


class Mirror:
    """A thread that copies each new checkpoint; as a context manager it leaves when all of them are there.

    What goes wrong is told once, tried again, and does not end the run: the checkpoints of the run directory are whole.

    Args:
        remote: where to copy to.
        checkpoints: the run's folder.
        section: `checkpoint` of the recipe, which says what is kept there too.
        tell: told a line.
    """

    def __init__(
        self, remote: RemoteCheckpoints, checkpoints: Path, section: CheckpointSection, tell: Callable[[str], None]
    ) -> None:
        self.remote, self.checkpoints, self.section, self._tell = remote, checkpoints, section, tell
        self._ending = threading.Event()
        self._told = ""
        self._copied: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()
        self.copy()

    def _work(self) -> None:
        wait = LOOK_INTERVAL_S
        while not self._ending.wait(wait):
            wait = LOOK_INTERVAL_S if self.copy() else RETRY_INTERVAL_S

    def copy(self) -> bool:
        """Copy what is new, then prune there; returns whether that succeeded."""
        try:
            new = False
            for folder in folders.complete(self.checkpoints):
                new = self._copy_one(folder) or new
            if new:
                self.remote.prune(self.section, self.checkpoints)
        except (OSError, ExpectedError) as error:
            if str(error) != self._told:
                self._told = str(error)
                self._tell(f"{error}; the checkpoints of the run directory are whole, and this is tried again")
            return False
        self._told = ""
        return True

    def _copy_one(self, folder: Path) -> bool:
        try:
            identity = (folder.name, folder.stat().st_mtime_ns)
            if identity in self._copied:
                return False
            new = self.remote.upload(folder)
        except (OSError, ExpectedError):
            if folder.exists():
                raise
            return False  # it was pruned meanwhile
        self._copied.add(identity)
        return new
