"""Checkpoints in host memory: what a node keeps of them, and what a rank asks of the nodes that do.

A generation is what a checkpoint's folder is on disk: every rank's files with their records, and a manifest. It counts
when its manifest and the parts of all ranks are there, wherever they lie; a half-delivered one is never read. A node
keeps two at most, the newest whole one and the one that is being delivered.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from xxhash import xxh3_128

from launcher.checkpoints.disk import PIECE
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, RankManifest

Extent = tuple[int, int]
"""Where a file lies in a rank's memory: (offset, bytes)."""


class HostMemory(Protocol):
    """What a rank asks of the nodes that keep states; every rank has one."""

    @property
    def source(self) -> Manifest | None:
        """The newest whole generation when the attempt began, with all its files; None: there was none."""
        ...

    @property
    def source_token(self) -> str | None:
        """Of that generation."""
        ...

    def faults(self, names: Sequence[str]) -> list[str]:
        """What is wrong with files of the source: those that do not have their checksums, or cannot be had."""
        ...

    def read(self, name: str) -> BinaryIO:
        """One file of the source.

        Raises:
            CheckpointError: the node that kept it is gone.
        """
        ...

    def keep(self, offer: "Offer") -> str | None:
        """Hand a part over to this rank's node, which brings it to another one by itself; returns what went wrong."""
        ...

    def delivered(self, token: str) -> str | None:
        """Whether this rank's part of a generation is safe.

        Returns:
            Nothing when it is; `None` while it is on its way; otherwise why the other node does not have it.
        """
        ...


@dataclass(frozen=True)
class Offer:
    """One rank's part of a generation, in memory that the rank shares.

    Attributes:
        token: of the generation.
        step: that it was made at.
        rank: that offers it.
        process: id of the rank's process.
        descriptor: of the memory, in that process.
        files: where each file lies in it.
        manifest: of the generation, without files, as JSON; from rank 0 only.
        known: token of the generation before, which is whole; everything older may go.
    """

    token: str
    step: int
    rank: int
    process: int
    descriptor: int
    files: Mapping[str, Extent]
    manifest: str | None
    known: str | None


@dataclass(frozen=True)
class Kept:
    """What a node has of a generation.

    Attributes:
        token: of the generation.
        step: that it was made at.
        manifest: of the generation, without files, as JSON; None: this node was not given it.
        parts: by rank, those that are here whole.
    """

    token: str
    step: int
    manifest: str | None
    parts: Mapping[int, RankManifest]


@dataclass(frozen=True)
class Generation:
    """A whole one.

    Attributes:
        token: of it.
        manifest: with the files of all ranks.
        places: which of the nodes that were asked have each rank's part.
    """

    token: str
    manifest: Manifest
    places: Mapping[int, tuple[str, ...]]


def newest_whole(kept: Mapping[str, Sequence[Kept]]) -> Generation | None:
    """The generation of the largest step of which everything is there, or None.

    Args:
        kept: what each node has, by the node's name.
    """
    tokens = {item.token: item.step for items in kept.values() for item in items}
    for token in sorted(tokens, key=lambda token: -tokens[token]):
        found = _assemble(token, {node: item for node, items in kept.items() for item in items if item.token == token})
        if found is not None:
            return found
    return None


def _assemble(token: str, kept: Mapping[str, Kept]) -> Generation | None:
    written = next((item.manifest for item in kept.values() if item.manifest is not None), None)
    if written is None:
        return None
    manifest = Manifest.model_validate_json(written)
    files: dict[str, FileRecord] = {}
    places: dict[int, tuple[str, ...]] = {}
    for rank in range(manifest.layout.world_size):
        places[rank] = tuple(node for node, item in kept.items() if rank in item.parts)
        if not places[rank]:
            return None
        files |= kept[places[rank][0]].parts[rank].files
    return Generation(token, manifest.model_copy(update={"files": files}), places)


@dataclass
class Part:
    """One rank's part on a node.

    Attributes:
        rank: whose it is.
        descriptor: of the memory that it lies in, in this process.
        size: bytes of that memory that are used.
        files: where each file lies.
        records: of the files; None until they are known, or while the part is still coming.
        closed: it is not kept any more.
    """

    rank: int
    descriptor: int
    size: int
    files: Mapping[str, Extent]
    records: Mapping[str, FileRecord] | None = None
    closed: bool = False

    @classmethod
    def shared_by(cls, offer: Offer) -> "Part":
        """The part in the memory of a rank on this machine, which stays when the rank ends.

        Raises:
            OSError: the rank's memory cannot be had.
        """
        descriptor = os.open(f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDONLY)
        size = max((offset + size for offset, size in offer.files.values()), default=0)
        return cls(offer.rank, descriptor, size, offer.files)

    @classmethod
    def of_size(cls, rank: int, size: int, files: Mapping[str, Extent]) -> "Part":
        """Room for a part that comes from another machine.

        Raises:
            OSError: there is no such room.
        """
        descriptor = os.memfd_create("zerofleet-kept")
        os.ftruncate(descriptor, size)
        return cls(rank, descriptor, size, files)

    def hashed(self, name: str) -> FileRecord:
        """What is in memory of one file now."""
        digest = xxh3_128()
        with self.open(name) as content:
            while piece := content.read(PIECE):
                digest.update(piece)
        return FileRecord(size=self.files[name][1], xxh3_128=digest.hexdigest(), rank=self.rank)

    def open(self, name: str) -> BinaryIO:
        """One of its files, to read.

        Raises:
            OSError: the part is not kept any more.
        """
        return self.open_extent(self.files[name])

    def open_extent(self, extent: Extent) -> BinaryIO:
        """A stretch of it, to read.

        Raises:
            OSError: the part is not kept any more.
        """
        if self.closed:  # its descriptor may be another file's by now
            raise OSError("it is not kept any more")
        return open_extent(self.descriptor, extent)

    def close(self) -> None:
        """Give the memory back."""
        self.closed = True
        os.close(self.descriptor)


@dataclass
class Shelf:
    """What one node keeps, generation by generation."""

    parts: dict[str, dict[int, Part]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)

    def put(self, token: str, step: int, part: Part, manifest: str | None, known: str | None) -> None:
        """Take a part in; everything but its generation and the one before, which is whole, goes."""
        for old in [held for held in self.parts if held not in (token, known)]:
            for gone in self.parts.pop(old).values():
                gone.close()
            self.steps.pop(old)
            self.manifests.pop(old, None)
        before = self.parts.setdefault(token, {}).get(part.rank)
        if before is not None:
            before.close()
        self.parts[token][part.rank] = part
        self.steps[token] = step
        if manifest is not None:
            self.manifests[token] = manifest

    def inventory(self) -> list[Kept]:
        """What is here whole."""
        return [
            Kept(
                token,
                self.steps[token],
                self.manifests.get(token),
                {
                    rank: RankManifest(rank=rank, token=token, files=dict(part.records))
                    for rank, part in parts.items()
                    if part.records is not None
                },
            )
            for token, parts in self.parts.items()
        ]

    def faults(self, token: str, rank: int, names: Iterable[str]) -> list[str]:
        """Which files of a part are not what they were when they came."""
        part = self.parts[token][rank]
        records = part.records or {}
        return [f"{name}: its content has changed in memory" for name in names if part.hashed(name) != records[name]]


class _Extent(io.RawIOBase):
    """A stretch of a file as a file of its own, which keeps it open."""

    def __init__(self, descriptor: int, extent: Extent) -> None:
        super().__init__()
        self._descriptor = os.dup(descriptor)
        self._offset, self._size = extent
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._size - self._at]
        count = os.preadv(self._descriptor, [view], self._offset + self._at) if view.nbytes else 0
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = min(max(base + offset, 0), self._size)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def open_extent(descriptor: int, extent: Extent) -> BinaryIO:
    """A stretch of a file or of memory, to read."""
    return io.BufferedReader(_Extent(descriptor, extent), PIECE)
