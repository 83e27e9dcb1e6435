"""The jobs this user submitted: facts in one small file a job.

Files appear whole or not at all and are never changed, so any number of processes may write and read at the same time.
A second copy lies in the run's directory: a record that is lost (another machine, a cleaned home) is adopted from it.
"""

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from cluster.errors import JobLookupError
from cluster.types import JobRecord

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = 4
RECORD_FILE = "record.json"
_FIELDS = {field.name for field in fields(JobRecord)}


def registry_folder() -> Path:
    """Where this user's records are: `$XDG_STATE_HOME/zerofleet/jobs`, by default below `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "zerofleet" / "jobs"


def new_id() -> str:
    """A job id that can be said and typed, never taken for a number of Slurm's: one of 24 million."""
    return "".join(secrets.choice(_CONSONANTS) + secrets.choice(_VOWELS) for _ in range(_SYLLABLES))


def add(record: JobRecord) -> None:
    """Write a record, and its copy into the job's directory.

    Raises:
        FileExistsError: the id is taken; make another one.
    """
    folder = registry_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = json.dumps(asdict(record), indent=1)
    _write_new(folder / f"{record.id}.json", content)
    with suppress(FileExistsError):
        _write_new(Path(record.job_directory) / RECORD_FILE, content)


def _write_new(path: Path, content: str) -> None:
    """Make a file, mode 0600, that other processes see whole; one writer wins."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)  # unlike a rename, it fails when the name is taken
    finally:
        Path(temporary).unlink()


def records() -> list[JobRecord]:
    """All records, oldest first; files that are none are passed over."""
    folder = registry_folder()
    try:
        listed = os.listdir(folder)  # noqa: PTH208 - names are enough
    except FileNotFoundError:
        return []
    names = (name for name in listed if name.endswith(".json") and not name.startswith("."))
    found = (_read(folder / name) for name in names)
    return sorted((record for record in found if record is not None), key=lambda record: record.submitted)


def _read(path: Path) -> JobRecord | None:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or not values.keys() <= _FIELDS:
            return None
        return JobRecord(**{**values, "argv": tuple(values["argv"]), "point": tuple(values.get("point", ()))})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(text: str, jobs_folder: Path | None = None) -> JobRecord:
    """The job that a person means.

    Args:
        text: a job id, the beginning of exactly one, the backend's own id, or a run directory (its newest job).
        jobs_folder: where a run directory of this name would keep its jobs; looked into when no record is known.

    Raises:
        JobLookupError: none, or several; the text names those that come near.
    """
    known = records()
    exact = [record for record in known if record.id == text]
    if exact:
        return exact[0]
    if jobs_folder is not None and jobs_folder.parent.is_dir():
        jobs = of_run(jobs_folder, known)
        if not jobs:
            raise JobLookupError(f"{jobs_folder.parent} has no job: nothing was submitted for it")
        return jobs[-1]
    matches = [record for record in known if text and record.id.startswith(text)]
    matches = matches or [record for record in known if record.backend_id == text]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise JobLookupError(f"{text} is the beginning of {len(matches)} job ids: {_names(matches)}")
    newest = f"; the newest are {_names(known[-3:][::-1])}" if known else "; none was submitted yet"
    raise JobLookupError(f"no job {text!r}: neither an id, the beginning of one, nor a run directory{newest}")


def _names(matches: list[JobRecord]) -> str:
    shown = [f"{record.id} ({record.name}, {_ago(record.submitted)})" for record in matches[:6]]
    return ", ".join(shown) + (", ..." if len(matches) > len(shown) else "")


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def of_run(jobs_folder: Path, known: list[JobRecord] | None = None) -> list[JobRecord]:
    """The jobs of a run, oldest first; those whose records are lost are adopted.

    Args:
        jobs_folder: where the run keeps them.
        known: all records, when the caller has them.
    """
    run_directory = str(jobs_folder.parent)
    known = records() if known is None else known
    own = {record.id: record for record in known if record.run_directory == run_directory}
    elsewhere = {record.id: Path(record.run_directory) for record in known if record.id not in own}
    for record in _copies(jobs_folder):
        # A folder that was copied, and not moved, holds records of jobs that are not its own.
        if record.id not in own and not (record.id in elsewhere and elsewhere[record.id].is_dir()):
            # The run's directory may have been moved since: what lies in it says where it is now.
            moved = {
                "run_directory": run_directory,
                "job_directory": str(jobs_folder / Path(record.job_directory).name),
            }
            own[record.id] = JobRecord(**{**vars(record), **moved})
            _adopt(own[record.id])
    return sorted(own.values(), key=lambda record: record.submitted)


def _copies(jobs_folder: Path) -> Iterator[JobRecord]:
    """Records in a run's directory, only those this user wrote: a record says which process to signal."""
    for path in jobs_folder.glob(f"*/{RECORD_FILE}"):
        if path.stat().st_uid == os.getuid() and (record := _read(path)) is not None:
            yield record


def _adopt(record: JobRecord) -> None:
    folder = registry_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _write_new(folder / f"{record.id}.json", json.dumps(asdict(record), indent=1))
    except FileExistsError:
        return  # the record of the place it was moved from


def new_job_directory(jobs_folder: Path) -> Path:
    """The folder the next job of a run will have: numbered, so that a dry run can name it. Not made yet."""
    numbers = [int(path.name) for path in jobs_folder.glob("[0-9]*") if path.name.isdecimal()]
    return jobs_folder / f"{max(numbers, default=0) + 1:04d}"
