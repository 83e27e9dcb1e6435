"""What crosses the seam: a request to run a command on machines, the record of a job, a look at its state."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # pydantic takes a while to load, and who only looks at jobs needs no profile
    from cluster.profile import Profile


JOB_VARIABLE = "ZEROFLEET_JOB"
"""Names the job's directory to every process that was started for it, so that a person can tell whose a process is."""

PHASES_VARIABLE = "ZEROFLEET_PHASES"
"""Tells a driver when its job was submitted, got its machines and had its Ray: a JSON mapping to Unix times."""

STOP_FILE_VARIABLE = "ZEROFLEET_STOP_FILE"
"""Names a file to a driver whose being there asks it to save and end, where no signal can be sent."""

DEFAULT_NODE_TIMEOUT_S = 15.0
"""How long a node that dies or is cut off may stay unnoticed; less gives up nodes of a machine that is very busy."""

NODE_TIMEOUT_VARIABLE = "ZEROFLEET_NODE_TIMEOUT_S"
"""Tells a driver within how many seconds its Ray notices the loss of a node; absent where others have set Ray up."""


class JobState(StrEnum):
    """Where a job is. One table for each backend maps its own words to these."""

    PENDING = "PENDING"
    """Waiting for machines; also between a requeue and the next start."""
    RUNNING = "RUNNING"
    """Has its machines: starting Ray, training, saving or ending."""
    COMPLETED = "COMPLETED"
    """The run reached its end."""
    STOPPED = "STOPPED"
    """Asked to, it saved and ended; submitting again continues."""
    CANCELLED = "CANCELLED"
    """Ended from outside without a word."""
    FAILED = "FAILED"
    """Ended by itself, wrongly."""
    UNKNOWN = "UNKNOWN"
    """Nobody can tell: the scheduler does not answer, or has forgotten the job, and no file says how it ended."""

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self in (JobState.COMPLETED, JobState.STOPPED, JobState.CANCELLED, JobState.FAILED)


@dataclass(frozen=True)
class JobRequest:
    """A command to run where a Ray cluster of the profile's size is up.

    Attributes:
        name: for people and schedulers.
        run_directory: of the run; all nodes must see it.
        job_directory: folder of this job inside it, not made yet; nothing random is in it, so that a dry run shows it.
        argv: the driver's command line.
        profile: where to run.
        nodes: machines.
        cpus_per_node: cores that Ray hands out on each.
        gpus_per_node: GPUs on each.
        save_before_end_seconds: how long before the end of its time the job must save and stop.
        progress_directory: a folder whose contents change when the run gets on (its checkpoints).
        memory_per_node: bytes that Ray hands out on each; None: what Ray finds.
        node_timeout_seconds: how long a node of a Ray that is started for the job may be gone unnoticed.
    """

    name: str
    run_directory: Path
    job_directory: Path
    argv: tuple[str, ...]
    profile: "Profile"
    nodes: int
    cpus_per_node: float
    gpus_per_node: int
    save_before_end_seconds: int
    progress_directory: Path
    memory_per_node: int | None = None
    node_timeout_seconds: float = DEFAULT_NODE_TIMEOUT_S


@dataclass(frozen=True)
class JobRecord:
    """Facts about a job, written once. Its state is not one of them: that is asked.

    Attributes:
        id: ours.
        name: of the run.
        backend: local, ray, slurm or ssh.
        backend_id: what the backend calls it: a Slurm or Ray job id, or a process.
        run_directory: of the run.
        job_directory: folder of the job inside it.
        argv: the driver's command line.
        submitted: Unix time.
        profile: name of the profile.
        nodes: machines asked for.
        sweep: id of the sweep it belongs to, or empty.
        point: what of the recipe was set for it in the sweep, `key=value` each.
        facts: what the backend needs to find the job again.
    """

    id: str
    name: str
    backend: str
    backend_id: str
    run_directory: str
    job_directory: str
    argv: tuple[str, ...]
    submitted: float
    profile: str
    nodes: int
    sweep: str = ""
    point: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobStatus:
    """A look at a job.

    Attributes:
        state: ours.
        native: the backend's own word for it.
        reason: why it waits, or how it ended, in the backend's or the job's own words.
        nodes: names of its machines.
        starts: how often it has been started (a requeued job more than once).
        expected_start: Unix time at which the scheduler means to start it.
    """

    state: JobState
    native: str = ""
    reason: str = ""
    nodes: tuple[str, ...] = ()
    starts: int = 0
    expected_start: float | None = None


@dataclass(frozen=True)
class Submission:
    """What a backend says after it took a request.

    Attributes:
        backend_id: what it calls the job.
        facts: what it needs to find the job again.
    """

    backend_id: str
    facts: dict[str, Any] = field(default_factory=dict)


class Log(Protocol):
    """A log that may still grow."""

    @property
    def name(self) -> str:
        """Where it is, for people."""
        ...

    def read(self, offset: int) -> bytes:
        """What stands from `offset` (bytes) to the present end; nothing when there is no log yet."""
        ...


@dataclass(frozen=True)
class FileLog:
    """A log in a file that is seen from here."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self, offset: int) -> bytes:
        """See `Log.read`."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(offset)
                return stream.read()
        except FileNotFoundError:
            return b""


class Backend(Protocol):
    """A way to have machines. `render` and `submit` share their code: what one shows, the other sends."""

    def render(self, request: JobRequest) -> str:
        """What `submit` would send, to read."""
        ...

    def submit(self, request: JobRequest) -> Submission:
        """Send it.

        Raises:
            BackendError: it was refused; the text holds the scheduler's own words and what was sent.
        """
        ...

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobStatus]:
        """Look at jobs, with one question to the scheduler for all of them; by our id."""
        ...

    def log(self, record: JobRecord, node: int, start: int | None) -> Log:
        """The log of one node of a job.

        Args:
            record: the job.
            node: index of the node; the driver writes to that of node 0.
            start: which start of a requeued job, from 1; default: the last one.

        Raises:
            BackendError: there is no such log.
        """
        ...

    def cancel(self, record: JobRecord, *, now: bool) -> str:
        """Ask a job to save and end, or, with `now`, to end at once; returns what was done, a sentence.

        Raises:
            BackendError: it could not be asked.
        """
        ...
