"""The cache of prepared data: one folder a fingerprint, there whole or not at all, whoever is killed when."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import StorageError
from launcher.recipe.schema import Recipe

ABANDONED_AFTER_S = 24 * 3600.0
"""An unfinished folder of another machine, which cannot be asked, is removed when nothing in it changed for so long."""


def cache_directory(recipe: Recipe) -> Path:
    """Where the recipe's prepared data is kept: `data.cache_directory`, `$ZEROFLEET_CACHE` or `~/.cache/zerofleet`."""
    named = recipe.data.cache_directory or os.environ.get("ZEROFLEET_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "zerofleet"


@contextmanager
def only_one(cache: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time work on `name`; the kernel ends a dead process's turn.

    On a file system without locks nobody waits: both build, and the second to finish drops its work (`building`).

    Raises:
        StorageError: the cache cannot be written.
    """
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        lock = (cache / "locks" / name).open("a")
    except OSError as error:
        raise StorageError(
            f"prepared data cannot be kept in {cache}: {error.strerror or error}; name another folder with "
            "data.cache_directory or ZEROFLEET_CACHE"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        _remove_leftovers(cache, name)
        yield


@contextmanager
def building(cache: Path, name: str, is_complete: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a new folder, and make it `cache / name` if the block ends well; on an exception nothing stays.

    Everything is on the disk before the name is: after a power cut, too, the folder is whole or absent.
    """
    final = cache / name
    folder = cache / f".{name}.{socket.gethostname()}.{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
        if final.exists():
            if is_complete(final):
                return  # somebody else was faster, where locks do not work
            shutil.rmtree(final)
        folder.rename(final)
        sync(cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(cache: Path, name: str) -> None:
    """Remove unfinished folders whose makers are dead; the caller holds the lock of `name`."""
    here = socket.gethostname()
    for folder in cache.glob(".*.partial"):
        owner, _, rest = folder.name[1:].partition(".")
        host = rest.removesuffix(".partial").rpartition(".")[0]
        if host != here:
            dead = _idle_seconds(folder) > ABANDONED_AFTER_S
        else:
            dead = owner == name or _lock_is_free(cache / "locks" / owner)
        if dead:
            shutil.rmtree(folder, ignore_errors=True)


def _lock_is_free(path: Path) -> bool:
    try:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _idle_seconds(folder: Path) -> float:
    newest = 0.0
    with suppress(OSError):  # its maker may be at work in it
        newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    return time.time() - newest if newest else 0.0


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
