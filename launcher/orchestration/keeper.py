"""A node's keeper of states in host memory: a Ray actor that outlives the workers, and goes when the driver does.

A rank shares its copy of the states with the keeper of its node, which costs nothing but a descriptor. The keeper then
hashes them and brings them to the keeper of the next node, in pieces, through Ray's object store; training goes on
meanwhile.
"""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import ray

from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.memory import Extent, Kept, Offer, Part, Shelf

PIECE = 2**23
"""Bytes of a message; a few of them must fit into the object store, which is small in the clusters that we start."""
IN_FLIGHT = 3
RESERVE = 2**30
"""So much memory a node must have left when it has taken a part in."""


class Keeper:
    """One node's. Several threads serve calls."""

    def __init__(self) -> None:
        self._shelf = Shelf()
        self._lock = threading.Lock()
        self._work = ThreadPoolExecutor(2, "deliveries")
        self._hashing: dict[tuple[str, int], Future[None]] = {}
        self._deliveries: dict[tuple[str, int], Future[str]] = {}

    def take(self, offer: Offer, next_keeper: Any | None) -> str | None:
        """Share a rank's part, and begin to bring it to the next node, if there is one; returns what went wrong."""
        try:
            part = Part.shared_by(offer)
        except OSError as error:
            return f"{socket.gethostname()}: the rank's memory cannot be shared: {error.strerror or error}"
        with self._lock:
            self._shelf.put(offer.token, offer.step, part, offer.manifest, offer.known)
            held = self._shelf.parts
            self._hashing = {key: job for key, job in self._hashing.items() if key[0] in held}
            self._deliveries = {key: job for key, job in self._deliveries.items() if key[0] in held}
            key = offer.token, offer.rank
            self._hashing[key] = self._work.submit(self._hash, part)
            if next_keeper is not None:
                self._deliveries[key] = self._work.submit(self._deliver, offer, part, next_keeper)
        return None

    def _hash(self, part: Part) -> None:
        part.records = {name: part.hashed(name) for name in part.files}

    def _deliver(self, offer: Offer, part: Part, next_keeper: Any) -> str:
        """Bring a part to the next node; returns what went wrong, or nothing."""
        try:
            self._hashing[offer.token, offer.rank].result()
            room = (offer.token, offer.step, offer.rank, part.size, part.files, offer.manifest, offer.known)
            refused: str | None = ray.get(next_keeper.make_room.remote(*room))
            if refused is not None:
                return refused
            pieces: list[Any] = []
            with part.open_extent((0, part.size)) as content:
                for offset in range(0, part.size, PIECE):
                    if len(pieces) == IN_FLIGHT:
                        ray.get(pieces.pop(0))
                    piece = next_keeper.write.remote(offer.token, offer.rank, offset, content.read(PIECE))
                    pieces.append(piece)
            ray.get(pieces)
            wrong: str | None = ray.get(next_keeper.seal.remote(offer.token, offer.rank, part.records))
            return wrong or ""
        except Exception as error:  # the next node is gone, or this generation is not wanted any more
            return f"{socket.gethostname()}: its copy did not reach the next node: {type(error).__name__}: {error}"

    def delivered(self, token: str, rank: int) -> str | None:
        """Whether a rank's part is safe; see `HostMemory.delivered`."""
        hashing, delivery = self._hashing.get((token, rank)), self._deliveries.get((token, rank))
        if hashing is None:
            return f"{socket.gethostname()}: it is not here any more"
        if not hashing.done() or not (delivery is None or delivery.done()):
            return None
        return "" if delivery is None else delivery.result()

    def make_room(
        self,
        token: str,
        step: int,
        rank: int,
        size: int,
        files: Mapping[str, Extent],
        manifest: str | None,
        known: str | None,
    ) -> str | None:
        """Prepare for a part of another node's rank; returns why it cannot be taken in."""
        with self._lock:
            self._shelf.put(token, step, Part.of_size(rank, 0, {}), None, known)  # what is older goes first
            free = psutil.virtual_memory().available
            if free < size + RESERVE:
                return (
                    f"{socket.gethostname()} has {free / 2**30:.1f} GiB of memory free, too little for "
                    f"{size / 2**30:.2f} GiB more"
                )
            try:
                self._shelf.put(token, step, Part.of_size(rank, size, files), manifest, known)
            except OSError as error:
                return f"{socket.gethostname()}: {error.strerror or error}"
        return None

    def write(self, token: str, rank: int, offset: int, piece: bytes) -> None:
        """Take in a piece of a part."""
        rest = memoryview(piece)
        while rest.nbytes:
            written = os.pwrite(self._shelf.parts[token][rank].descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def seal(self, token: str, rank: int, records: Mapping[str, FileRecord]) -> str | None:
        """All of a part is here; returns what is wrong with it."""
        part = self._shelf.parts[token][rank]
        changed = [name for name in part.files if part.hashed(name) != records[name]]
        if changed:
            return f"{socket.gethostname()}: {', '.join(changed)} changed on the way"
        part.records = records
        return None

    def inventory(self) -> list[Kept]:
        """What is here whole; waits for what is just being hashed."""
        for job in list(self._hashing.values()):
            job.exception()
        with self._lock:
            return self._shelf.inventory()

    def faults(self, token: str, rank: int, names: Sequence[str]) -> list[str]:
        """What is wrong with files of a rank's part."""
        return self._shelf.faults(token, rank, names)

    def extent(self, token: str, rank: int, name: str) -> tuple[int, int, Extent]:
        """Where a file lies: (this process's id, descriptor in it, extent)."""
        part = self._shelf.parts[token][rank]
        return os.getpid(), part.descriptor, part.files[name]

    def piece(self, token: str, rank: int, name: str, offset: int) -> bytes:
        """A piece of a file, for a rank of another node."""
        part = self._shelf.parts[token][rank]
        start, size = part.files[name]
        with part.open_extent((start + offset, min(PIECE, size - offset))) as content:
            return content.read()
