"""The folder of one start of a job: how its nodes, its driver and whoever watches speak to each other.

It lies in the run directory, which all nodes see. A requeued job has one of these a start. Everything in it is written
whole or not at all, each file by one process only.
"""

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.errors import BackendError
from cluster.types import DEFAULT_NODE_TIMEOUT_S

SPEC_FILE = "spec.json"


@dataclass(frozen=True)
class JobSpec:
    """What the nodes of a job need to know; plain data in `spec.json`, mode 0600.

    Attributes:
        name: of the run.
        argv: the driver's command line.
        environment: set for the driver and, by it, for the workers; without secrets.
        working_directory: of the driver.
        nodes: machines.
        cpus_per_node: cores that Ray hands out on each.
        gpus_per_node: GPUs on each.
        join_timeout_s: how long the first node waits for the others.
        dashboard: serve Ray's dashboard on the first node's loopback.
        progress_directory: its contents change when the run gets on.
        addresses: of the nodes, when they are known beforehand.
        names: of the nodes, when they are known beforehand.
        spawn_peers: the first node's process starts those of the others, on the same machine.
        secret_names: of variables that the agents have in their own environment, because no file may hold them.
        min_nodes: fewest machines to go on with when others do not come; None: all are needed.
        memory_per_node: bytes that Ray hands out on each; None: what Ray finds.
        submitted: Unix time.
        node_timeout_s: how long a lost node may stay unnoticed.
    """

    name: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    nodes: int
    cpus_per_node: float
    gpus_per_node: int
    join_timeout_s: float
    dashboard: bool
    progress_directory: str
    addresses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    spawn_peers: bool = False
    secret_names: tuple[str, ...] = ()
    min_nodes: int | None = None
    memory_per_node: int | None = None
    submitted: float = field(default_factory=time.time)
    node_timeout_s: float = DEFAULT_NODE_TIMEOUT_S

    def write(self, job_directory: Path) -> None:
        """Put it where the nodes read it."""
        write_json(job_directory / SPEC_FILE, asdict(self))

    @classmethod
    def read(cls, job_directory: Path) -> "JobSpec":
        """Read what `write` wrote.

        Raises:
            BackendError: it is not there, most likely because this machine does not see the folder.
        """
        values = read_json(job_directory / SPEC_FILE)
        if values is None:
            raise BackendError(
                f"{socket.gethostname()} does not see {job_directory / SPEC_FILE}: "
                "the run directory must lie on a file system that all nodes share; set it with --run-dir"
            )
        known = {name.name for name in fields(cls)}
        tuples = {key: tuple(values[key]) for key in ("argv", "addresses", "names", "secret_names")}
        return cls(**{**{key: value for key, value in values.items() if key in known}, **tuples})


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself.

    Attributes:
        name: of the machine.
        address: at which other nodes reach it.
        process: identity of its agent.
        state: starting, up, left or failed.
        message: why it failed.
        time: Unix time of the report.
    """

    name: str
    address: str
    process: str
    state: str
    message: str = ""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Outcome:
    """How one start of a job ended.

    Attributes:
        state: completed, stopped, cancelled or failed.
        exit_code: of the driver; negative for a signal, `None` if it never ran.
        message: why, for people.
        signal: which signal asked it to stop.
        requeue: the job goes on in another start.
        progress: names of what the run had saved by then.
        time: Unix time.
    """

    state: str
    exit_code: int | None
    message: str = ""
    signal: str = ""
    requeue: bool = False
    progress: str = ""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class StartFolder:
    """Names in the folder of one start, and what is read from and written to it."""

    path: Path

    @classmethod
    def of(cls, job_directory: Path, number: int) -> "StartFolder":
        """The folder of a job's start, counted from 1."""
        return cls(job_directory / f"start_{number:03d}")

    @classmethod
    def all_of(cls, job_directory: Path) -> list["StartFolder"]:
        """Folders of a job's starts so far, in order."""
        numbers = (path.name.removeprefix("start_") for path in job_directory.glob("start_*"))
        return [cls.of(job_directory, number) for number in sorted(int(text) for text in numbers if text.isdecimal())]

    def node_log(self, index: int) -> Path:
        """Output of a node's agent; the driver's output too for node 0."""
        return self.path / f"node_{index:04d}.log"

    def ray_log(self, index: int) -> Path:
        """Output of a node's `ray start`."""
        return self.path / f"ray_{index:04d}.log"

    def report(self, index: int, report: NodeReport) -> None:
        """Say how a node is."""
        write_json(self.path / f"node_{index:04d}.json", asdict(report))

    def node(self, index: int) -> NodeReport | None:
        """What a node last said."""
        values = read_json(self.path / f"node_{index:04d}.json")
        return None if values is None else NodeReport(**values)

    def announce_head(self, address: str, token: str) -> None:
        """Tell the other nodes which Ray cluster to join; only this user can read it."""
        write_json(self.path / "head.json", {"address": address, "token": token})

    def head(self) -> tuple[str, str] | None:
        """Address and token of the Ray cluster, once announced."""
        values = read_json(self.path / "head.json")
        return None if values is None else (values["address"], values["token"])

    def forget_head(self) -> None:
        """Remove the token."""
        (self.path / "head.json").unlink(missing_ok=True)

    def mark(self, phase: str) -> None:
        """Note that a phase was reached; called by the first node only."""
        write_json(self.path / "phases.json", {**self.phases(), phase: time.time()})

    def phases(self) -> dict[str, float]:
        """Unix times at which phases were reached, in order."""
        return read_json(self.path / "phases.json") or {}

    def end(self, outcome: Outcome) -> None:
        """Say how this start ended; the other nodes leave then."""
        write_json(self.path / "outcome.json", asdict(outcome))

    def is_first(self, what: str) -> bool:
        """Whether nobody else has done or will do this; of several nodes, one gets it."""
        try:
            (self.path / f"{what}.once").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def outcome(self) -> Outcome | None:
        """How this start ended, if it has."""
        values = read_json(self.path / "outcome.json")
        return None if values is None else Outcome(**values)


def last_start(job_directory: Path) -> StartFolder | None:
    """The folder of a job's latest start."""
    folders = StartFolder.all_of(job_directory)
    return folders[-1] if folders else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file whole, mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(values, stream, indent=1)
    os.replace(temporary, path)  # noqa: PTH105 - mkstemp gives text


def read_json(path: Path) -> dict[str, Any] | None:
    """Read such a file; `None` when there is none."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return values
