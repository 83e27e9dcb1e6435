"""Keeping the newest state in host memory, beside the checkpoints on disk, and beginning from it.

A state in memory is what a checkpoint is: the same files, records and manifest. Training waits while the states are
copied, as for a checkpoint that is written beside it; what follows is done by the keepers of the nodes.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.disk import PIECE, HashedFile
from launcher.checkpoints.faults import reach
from launcher.checkpoints.files import FileRecord, path_inside, record_of
from launcher.checkpoints.manifest import Manifest
from launcher.checkpoints.memory import HostMemory, Offer
from launcher.errors import CheckpointError
from launcher.training.checkpoint_files import CheckpointFiles
from launcher.training.collective_folder import CollectiveFolder, attempted
from launcher.training.distributed import all_gather, broadcast
from launcher.training.host_memory import HostBuffer

RESERVE = 2**30
"""So much memory a node must have left when a rank has made room for its copies."""
BUSY = "the state before is still on its way"


class MemorySaver:
    """Every rank has one, and its methods are collective.

    A rank copies into two buffers in turn: its node keeps what is in one of them while the other is filled.

    Args:
        memory: the nodes that keep states.
        attempt: names this attempt, the same on every rank.
        tell: told what a person should know, on rank 0.
        expected: bytes of this rank's states, as far as they are known.
    """

    def __init__(self, memory: HostMemory, attempt: str, tell: Callable[[str], None], expected: int) -> None:
        self._memory = memory
        self._attempt = attempt
        self._tell_person = tell
        self._expected = expected
        self._buffers = [HostBuffer(), HostBuffer()]
        self._saves = self._tries = 0
        self._token: str | None = None
        self._known: str | None = None
        self._told: set[str] = set()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def newest(self, checkpoints: Path) -> Manifest | None:
        """The state that is to be had from memory, if it is newer than every checkpoint and whole."""
        manifest = self._memory.source
        newest_on_disk = broadcast(lambda: max(map(folders.step_of, folders.complete(checkpoints)), default=0))
        if manifest is None or manifest.step <= newest_on_disk:
            return None
        wrong = sorted({fault for part in all_gather(self._memory.faults(self._share(manifest))) for fault in part})
        if wrong:
            self._tell(f"the state of step {manifest.step} in memory cannot be used: {'; '.join(wrong)}")
            return None
        self._known = self._memory.source_token
        return manifest

    def _share(self, manifest: Manifest) -> list[str]:
        """The files that this rank wrote, or those of the ranks that it stands for at another size."""
        return [name for name, record in manifest.files.items() if record.rank % self.world_size == self.rank]

    @contextmanager
    def as_folder(self, manifest: Manifest, files: CheckpointFiles) -> Iterator[Path]:
        """A folder in which the state's files seem to lie, for DeepSpeed, which looks at names before it asks for them.

        The files in it are empty; `files` reads what it is asked for from memory.
        """
        place = Path(tempfile.mkdtemp(prefix="zf-kept-"))
        folder = place / folders.folder_name(manifest.step)
        try:
            folder.mkdir()
            for name in manifest.files:
                path = path_inside(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            with files.reading_from(folder, self._memory.read):
                yield folder
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def write_down(self, manifest: Manifest, checkpoints: Path) -> list[str]:
        """Make a checkpoint on disk of the state in memory, for a layout that cannot load it; returns what is wrong."""
        incomplete = checkpoints / (folders.folder_name(manifest.step) + folders.INCOMPLETE)
        target = CollectiveFolder(incomplete, f"{self._attempt}.kept")
        errors = target.make()
        if not errors:
            records: dict[str, FileRecord] = {}
            wrong = attempted(lambda: records.update(self._write_share(manifest, incomplete)))
            errors = target.record(records, wrong)
        errors = errors or target.commit(manifest.model_copy(update={"files": {}}))
        if errors:
            target.abandon()
        return errors

    def _write_share(self, manifest: Manifest, folder: Path) -> dict[str, FileRecord]:
        records = {}
        for name in self._share(manifest):
            path = path_inside(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = HashedFile(path)
            with self._memory.read(name) as content, file:
                while piece := content.read(PIECE):
                    file.write(piece)
            records[name] = record_of(file, self.rank)
            if file.xxh3_128 != manifest.files[name].xxh3_128:
                raise CheckpointError(f"{name} has changed in memory")
        return records

    def save(self, manifest: Manifest, hand_over: Callable[[HostBuffer], list[str]]) -> bool:
        """Keep the state of a step; returns whether it is kept.

        What goes wrong is told once: the checkpoints on disk are what remains.

        Args:
            manifest: of the state, without files.
            hand_over: fills a buffer with this rank's states; returns what went wrong.
        """
        buffer = self._buffers[self._saves % 2]
        obstacles = all_gather(self._obstacle(buffer))
        if BUSY in obstacles:
            return False
        if any(obstacles):
            return self._failed(manifest.step, sorted(text for text in obstacles if text is not None))
        buffer.empty()
        errors = hand_over(buffer)
        reach("memory.copied")
        self._tries += 1
        token = f"{self._attempt}.kept.{self._tries}"  # another one for every try: no mixture may look whole
        offer = Offer(
            token=token,
            step=manifest.step,
            rank=self.rank,
            process=os.getpid(),
            descriptor=buffer.descriptor,
            files={name: (offset, size) for name, offset, size in buffer.files},
            manifest=manifest.model_dump_json() if self.rank == 0 else None,
            known=self._known,
        )
        refused = None if errors else self._memory.keep(offer)
        errors = [*errors, *([] if refused is None else [refused])]
        everywhere = all_gather(errors)
        self._expected = max(self._expected, buffer.used)
        if any(everywhere):
            return self._failed(manifest.step, sorted({text for texts in everywhere for text in texts}))
        reach("memory.kept")
        self._token = self._known = token
        self._saves += 1
        return True

    def _obstacle(self, buffer: HostBuffer) -> str | None:
        """Why this rank cannot keep a state now."""
        if self._token is not None:
            delivered = self._memory.delivered(self._token)
            if delivered is None:
                return BUSY
            if delivered:
                self._tell_once(f"states in memory are kept on one node only: {delivered}")
        try:
            reach("memory.begins")
            needed = max(0, self._expected - buffer.capacity)
            free = psutil.virtual_memory().available
        except MemoryError:
            return f"{socket.gethostname()} has no memory left"
        if needed and free < needed + RESERVE:
            gib = 2**30
            return f"{socket.gethostname()} has {free / gib:.1f} GiB free, too little for {needed / gib:.2f} GiB more"
        return None

    def _failed(self, step: int, errors: list[str]) -> bool:
        text = "; ".join(errors)
        if self.rank == 0:
            self._tell_once(
                f"the state of step {step} is not kept in memory (fault_tolerance.memory_checkpoint): {text}; "
                "the checkpoints on disk are what a restart goes back to",
                text,
            )
        return False

    def _tell_once(self, text: str, what: str | None = None) -> None:
        """Any rank may; the driver shows what each of them says."""
        if (what or text) not in self._told:
            self._told.add(what or text)
            self._tell_person(text)

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            self._tell_person(text)

    def close(self) -> None:
        """Give up this process's hold on the buffers; the nodes keep theirs."""
        for buffer in self._buffers:
            buffer.close()
