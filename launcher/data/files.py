"""Files of a source: found by globs, read once for a content hash, and not read again while size and time stand."""

import codecs
import glob
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from xxhash import xxh3_128, xxh3_128_hexdigest

from launcher.run_directory import write_atomically

CHUNK_BYTES = 4 << 20
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick: it is not remembered."""
MAX_THREADS = 8
COMPRESSED_BEGINNINGS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04", b"\x04\x22\x4d\x18")
_PATTERN_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


class FileFacts(BaseModel):
    """What is known of one file.

    Attributes:
        path: absolute path.
        size: bytes.
        mtime_ns: time of the last change, in nanoseconds since 1970.
        digest: XXH3 of the content, 128 bits, hexadecimal.
        is_utf8: whether the content decodes; true for compressed files, whose content is not looked into.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    mtime_ns: int
    digest: str
    is_utf8: bool

    def is_current(self) -> bool:
        """Tell whether the file still has this size and time."""
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


def find_files(patterns: Sequence[str], exclude: Sequence[str]) -> tuple[list[str], list[str]]:
    """Expand paths and globs, leave out what `exclude` matches, and sort.

    Args:
        patterns: paths or globs; `**` crosses folders. Hidden files match only patterns that name the dot.
        exclude: globs matched against the whole absolute path; a relative one matches at any depth.

    Returns:
        Absolute paths, and what is wrong with the patterns.
    """
    excluded = [_as_regex(pattern) for pattern in exclude]
    found: set[str] = set()
    left_out = 0
    problems: list[str] = []
    for pattern in patterns:
        absolute = os.path.abspath(Path(pattern).expanduser())  # noqa: PTH100 (Path.absolute keeps "..")
        if glob.has_magic(absolute):
            matches = set(glob.iglob(absolute, recursive=True))  # noqa: PTH207 (as in the recipe: hidden files stay out)
        elif Path(absolute).is_dir():
            problems.append(f"{pattern} is a folder; write {pattern}/** for all the files in it")
            continue
        else:
            matches = {absolute} if Path(absolute).exists() else set()
        kept = {path for path in matches if not any(regex.fullmatch(path) for regex in excluded)}
        left_out += len(matches) - len(kept)
        found |= {path for path in kept if Path(path).is_file()}
        if not matches:
            problems.append(f"{pattern} matches no file" if glob.has_magic(absolute) else f"there is no file {pattern}")
    if not found and not problems:
        problems.append(
            f"exclude leaves out all {left_out} matches" if left_out else f"{', '.join(patterns)} match folders only"
        )
    return sorted(found), problems


def _as_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob in which `**` crosses folders, as `glob.translate` of Python 3.13 does."""
    anchored = pattern if pattern.startswith(("/", "**")) else f"**/{pattern}"
    translated = []
    for part in _PATTERN_PARTS.findall(anchored):
        if part == "**/":
            translated.append("(?:.*/)?")
        elif part == "**":
            translated.append(".*")
        elif part == "*":
            translated.append("[^/]*")
        elif part == "?":
            translated.append("[^/]")
        elif len(part) > 1:
            inner = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
            translated.append(f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]")
        else:
            translated.append(re.escape(part))
    return re.compile("".join(translated), re.DOTALL)


def scan_files(
    paths: Sequence[str], index: Path, on_file: Callable[[int], None] = lambda size: None
) -> tuple[list[FileFacts], list[str]]:
    """Hash files in parallel, except those that `index` knows with their present size and time.

    Args:
        paths: absolute paths.
        index: JSON file that remembers; read if it is there, replaced when something is new.
        on_file: called with the size of each file that has been dealt with.

    Returns:
        Facts in the order of `paths`, and what could not be read.
    """
    known = _read_index(index)
    started_ns = time.time_ns()
    problems: list[str] = []

    def scan(path: str) -> FileFacts | None:
        facts = known.get(path)
        try:
            if facts is None or not facts.is_current():
                facts = _read_facts(path)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}")
            return None
        on_file(facts.size)
        return facts

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        scanned = [facts for facts in pool.map(scan, paths) if facts is not None]
    settled = {facts.path: facts for facts in scanned if facts.mtime_ns < started_ns - SETTLED_NS}
    if settled != known:
        _write_index(index, settled.values())
    return scanned, sorted(problems)


def _read_facts(path: str) -> FileFacts:
    hasher = xxh3_128()
    decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
    is_utf8 = True
    with Path(path).open("rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        first = True
        while chunk := stream.read(CHUNK_BYTES):
            if first and chunk.startswith(COMPRESSED_BEGINNINGS):
                decoder = None
            first = False
            hasher.update(chunk)
            if decoder is not None:
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError:
                    decoder, is_utf8 = None, False
    if decoder is not None:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            is_utf8 = False
    return FileFacts(
        path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, digest=hasher.hexdigest(), is_utf8=is_utf8
    )


def index_path(cache: Path, patterns: Iterable[str], exclude: Iterable[str]) -> Path:
    """Where the facts of one source's files are remembered."""
    key = xxh3_128_hexdigest(json.dumps([sorted(patterns), sorted(exclude)]).encode())
    return cache / "files" / f"{key}.json"


def _read_index(index: Path) -> dict[str, FileFacts]:
    try:
        rows: list[Any] = json.loads(index.read_bytes())
        facts = [FileFacts.model_validate(dict(zip(FileFacts.model_fields, row, strict=True))) for row in rows]
    except (OSError, ValueError, TypeError):
        return {}  # it only saves time: without it, or with a damaged one, the files are read again
    return {item.path: item for item in facts}


def _write_index(index: Path, facts: Iterable[FileFacts]) -> None:
    with suppress(OSError):  # a cache that cannot be written may still hold the prepared data
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, json.dumps([list(item.model_dump().values()) for item in facts], separators=(",", ":")))
