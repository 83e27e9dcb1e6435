"""A node's agent: brings Ray up on its machine, does the node's part, and takes everything down again.

SIGTERM, SIGINT and SIGUSR2 (Slurm's warning) mean "save and end"; SIGQUIT means "end now". The agent ends what it
started by pid, orphans too, and nothing else.
"""

import os
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster.errors import ExpectedError
from cluster.processes import ProcessIdentity, adopt_orphans, end_descendants
from cluster.ray_node import (
    NodeResources,
    RayNode,
    RaySecrets,
    RayStartError,
    accepts_connections,
    port_block,
    prepare_worker,
)
from cluster.start_folder import JobSpec, NodeReport, Outcome, StartFolder
from cluster.types import JOB_VARIABLE

POLL_S = 0.1
REPORT_S = 1.0
"""A waiting node repeats its report this often: writing into a folder makes NFS look for what others wrote there."""
START_TRIES = 3
ALIVE_S = 10.0
"""The first node repeats its report this often while the driver runs."""
SILENCE_S = 60.0
"""A first node that has not repeated it for so long is lost."""


class ProvisionError(ExpectedError):
    """The nodes of a job did not come up."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the nodes of its job.

    Attributes:
        index: of this node.
        names: of all nodes, in order.
        address: at which the other nodes reach this one.
        port_key: from which ports are derived; differs between jobs that may share a machine.
    """

    index: int
    names: tuple[str, ...]
    address: str
    port_key: str


class NodeAgent(ABC):
    """One node's part in one start of a job."""

    def __init__(self, spec: JobSpec, job_directory: Path, folder: StartFolder, place: Place) -> None:
        self.spec = spec
        self.job_directory = job_directory
        self.folder = folder
        self.place = place
        self.signals: list[signal.Signals] = []
        self.ending_now = False
        self.ray: RayNode | None = None
        self._reported = 0.0

    @property
    def resources(self) -> NodeResources:
        """What Ray may hand out here."""
        return NodeResources(self.spec.cpus_per_node, self.spec.gpus_per_node, self.spec.memory_per_node)

    @property
    def must_end(self) -> bool:
        """Whether this process was asked to end, sooner or at once."""
        return bool(self.signals) or self.ending_now

    def run(self) -> Outcome:
        """Do this node's part to the end; nothing that was started here is left."""
        os.environ[JOB_VARIABLE] = str(self.job_directory)
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGQUIT):
            signal.signal(number, self._take_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with Slurm's SIGTERM; submitit would warn of it
        self.report("starting")
        try:
            outcome = self.play()
        except ExpectedError as error:
            say(str(error))
            outcome = Outcome("failed", None, str(error))
        except Exception as error:  # a defect of ours: whoever watches must still learn that this node is lost
            say(traceback.format_exc())
            outcome = Outcome("failed", None, f"{type(error).__name__}: {error}")
        self.end_ray(keep_logs=outcome.state == "failed")
        self.leave(outcome)
        end_descendants()
        self.report("failed" if outcome.state == "failed" else "left", outcome.message)
        return outcome

    @abstractmethod
    def play(self) -> Outcome:
        """The node's part."""

    @abstractmethod
    def leave(self, outcome: Outcome) -> None:
        """What is to do when Ray has ended here."""

    def _take_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGQUIT:
            self.ending_now = True
        else:
            self.signals.append(signal.Signals(number))

    def report(self, state: str, message: str = "") -> None:
        """Tell the other nodes and whoever watches how this one is."""
        self._reported = time.monotonic()
        process = str(ProcessIdentity.of(os.getpid()))
        name = self.place.names[self.place.index]
        self.folder.report(self.place.index, NodeReport(name, self.place.address, process, state, message))

    def refresh(self, every_s: float = REPORT_S) -> None:
        """Repeat the last report when it is so old."""
        if time.monotonic() - self._reported > every_s:
            last = self.folder.node(self.place.index)
            self.report(last.state if last else "starting")

    def end_ray(self, *, keep_logs: bool) -> None:
        """End Ray here, if it runs."""
        if self.ray is not None:
            self.ray.end(self.folder.path / f"ray_logs_{self.place.index:04d}" if keep_logs else None)
            self.ray = None


class OtherNode(NodeAgent):
    """Joins the first node's Ray, and leaves when the job has ended or Ray has.

    In an elastic job it joins again when its Ray has ended (its cable was out, say), while the first node is there.
    """

    _heard: float | None = None
    _heard_at = 0.0

    def play(self) -> Outcome:
        """See `NodeAgent.play`."""
        self._heard_at = time.monotonic()
        attempt = 1
        while (outcome := self._take_part(attempt)) is None:
            self.end_ray(keep_logs=True)
            say("ray: it ended here; joining again")
            attempt += 1
        return outcome

    def leave(self, outcome: Outcome) -> None:
        """Do nothing: the first node says how the job ended."""

    def first_node_is_lost(self) -> bool:
        """Whether the first node has stopped repeating its report; looked at often, or it seems to be sooner."""
        report = self.folder.node(0)
        if report is not None and report.time != self._heard:
            self._heard, self._heard_at = report.time, time.monotonic()
        return time.monotonic() - self._heard_at > SILENCE_S

    def _take_part(self, again: int) -> Outcome | None:
        """Join, and stay; returns `None` when there is to be another time.

        Args:
            again: the how manieth time this is.
        """
        for attempt in range(again, again + START_TRIES):
            ray = self._prepare_ray(attempt)
            head = self._await_head(first=again == 1)
            if head is None:
                break
            try:
                return self._join(ray, *head)
            except RayStartError as error:
                self.end_ray(keep_logs=True)
                if attempt == again + START_TRIES - 1:
                    raise
                say(f"{error}\nray: this node did not join; trying again")
        return Outcome("stopped", None, "the job ended before this node joined")

    def _prepare_ray(self, attempt: int) -> RayNode:
        """Start what can be started before the head is known, on other ports at each attempt."""
        index = self.place.index
        ports = port_block(f"{self.place.port_key}/{index}", self.place.address, skip=attempt - 1)
        self.ray = prepare_worker(self.place.address, ports, self.resources, log=self.folder.ray_log(index))
        return self.ray

    def _await_head(self, *, first: bool) -> tuple[str, str] | None:
        """Wait for a head that listens; `None` when the job ends before.

        Raises:
            ProvisionError: none came, or the first node is lost.
        """
        deadline = time.monotonic() + self.spec.join_timeout_s
        while self.folder.outcome() is None and not self.ending_now:
            head = self.folder.head()
            if head is not None and accepts_connections(head[0]):
                return head
            if first and time.monotonic() > deadline:
                what = f"the Ray head at {head[0]} does not answer" if head else "the first node announced no Ray head"
                raise ProvisionError(f"{what} within {self.spec.join_timeout_s:.0f} s, seen from {self.place.address}")
            if not first and self.first_node_is_lost():
                raise ProvisionError(f"the first node, {self.place.names[0]}, is lost")
            self.refresh()
            time.sleep(POLL_S)
        return None

    def _join(self, ray: RayNode, head_address: str, token: str) -> Outcome | None:
        say(f"ray: joining {head_address} as {self.place.address}")
        ray.join(head_address, RaySecrets(token, self.spec.node_timeout_s))
        joined = False
        while self.folder.outcome() is None and not self.ending_now:
            if not joined and ray.is_up:
                joined = True
                say("ray: joined")
                self.report("up")
            if ray.process.poll() is not None:
                if not joined:
                    ray.check_alive()
                if self.spec.min_nodes is not None:
                    return None
                return Outcome("failed", None, f"Ray ended here with code {ray.process.returncode}")
            if not joined:
                self.refresh()
            self.first_node_is_lost()
            time.sleep(5 * POLL_S if joined else POLL_S)
        return Outcome("completed", None)


def say(text: str) -> None:
    """Write a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201 - the agent's output is the node's log


def agent_command(job_directory: Path, index: int, *options: str) -> list[str]:
    """The command line of a node's agent."""
    return [sys.executable, "-P", "-m", "cluster.provision", str(job_directory), "--node", str(index), *options]
