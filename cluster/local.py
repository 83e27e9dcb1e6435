"""This machine: a Ray cluster for a run in the foreground, and jobs that outlive the terminal they were typed in."""

import os
import secrets
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cluster.agent import agent_command
from cluster.errors import BackendError
from cluster.job_files import log_of, make_job_directory, spec_of, status_from_files
from cluster.processes import ProcessIdentity
from cluster.provision import start_detached, usable_address
from cluster.ray_node import (
    NodeResources,
    RayNode,
    RaySecrets,
    RayStartError,
    accepts_connections,
    port_block,
    start_head,
    start_worker,
)
from cluster.types import DEFAULT_NODE_TIMEOUT_S, JobRecord, JobRequest, JobState, JobStatus, Log, Submission

HEAD_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LocalRay:
    """A running (or just starting) Ray cluster on this machine.

    Attributes:
        environment: what a process needs to join it, RAY_ADDRESS and the token included.
        nodes: of the cluster, the head first.
    """

    environment: dict[str, str]
    nodes: tuple[RayNode, ...]

    def check_alive(self) -> None:
        """Raise if a node has ended.

        Raises:
            RayStartError: with the end of what `ray start` wrote.
        """
        for node in self.nodes:
            node.check_alive()


@contextmanager
def local_ray(
    resources: NodeResources, nodes: int = 1, node_timeout_s: float = DEFAULT_NODE_TIMEOUT_S
) -> Iterator[LocalRay]:
    """Start a Ray cluster on loopback, without dashboard and with token authentication; end it on leaving.

    Returns soon: Ray needs a few seconds more, in which the caller can do other work.

    Args:
        resources: what each node hands out.
        nodes: Ray nodes, all on this machine, each with an address of its own.
        node_timeout_s: how long the loss of one may stay unnoticed.
    """
    cluster = RaySecrets(secrets.token_hex(32), node_timeout_s)
    key = f"{os.getuid()}/{os.getpid()}"
    addresses = [usable_address("127.0.0.1", index) for index in range(nodes)]
    with ExitStack() as stack:
        head_address, head = start_head(addresses[0], port_block(f"{key}/0", addresses[0]), resources, cluster)
        stack.callback(head.end)
        started = [head]
        if nodes > 1:
            _await(head, head_address)
        for index, address in enumerate(addresses[1:], start=1):
            ports = port_block(f"{key}/{index}", address)
            started.append(start_worker(head_address, address, ports, resources, cluster))
            stack.callback(started[-1].end)
        yield LocalRay({**cluster.environment, "RAY_ADDRESS": head_address}, tuple(started))


def _await(head: RayNode, address: str) -> None:
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while not accepts_connections(address):
        head.check_alive()
        if time.monotonic() > deadline:
            raise RayStartError(f"the local Ray head does not answer at {address} within {HEAD_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


class LocalBackend:
    """Jobs as processes of this machine, in a session of their own."""

    def render(self, request: JobRequest) -> str:
        """See `Backend.render`."""
        agent, driver = shlex.join(agent_command(request.job_directory, 0)), shlex.join(request.argv)
        return f"# detached on this machine, with {request.nodes} Ray node(s)\n{agent}\n# runs\n{driver}\n"

    def submit(self, request: JobRequest) -> Submission:
        """See `Backend.submit`."""
        make_job_directory(request.job_directory)
        addresses = tuple(usable_address("127.0.0.1", index) for index in range(request.nodes))
        spec_of(request, addresses=addresses, spawn_peers=True).write(request.job_directory)
        process = start_detached(request.job_directory, 0, request.profile.secrets)
        return Submission(str(process.pid), {"host": os.uname().nodename, "process": str(process)})

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobStatus]:
        """See `Backend.states`."""
        return {record.id: self._state(record) for record in records}

    def _state(self, record: JobRecord) -> JobStatus:
        told = status_from_files(record)
        if told.state.is_final:
            return told
        here = os.uname().nodename
        if record.facts.get("host") != here:
            reason = f"it is a process of {record.facts.get('host')}, and this is {here}"
            return JobStatus(JobState.UNKNOWN, reason=reason)
        if ProcessIdentity.parse(record.facts["process"]).is_alive:
            return JobStatus(JobState.RUNNING, "process", told.reason, told.nodes, told.starts)
        told = status_from_files(record)  # it may have ended between the two looks
        if told.state.is_final:
            return told
        reason = "its process is gone without a word: killed, or the machine went down"
        return JobStatus(JobState.FAILED, "gone", reason, told.nodes, told.starts)

    def log(self, record: JobRecord, node: int, start: int | None) -> Log:
        """See `Backend.log`."""
        return log_of(record, node, start)

    def cancel(self, record: JobRecord, *, now: bool) -> str:
        """See `Backend.cancel`."""
        process = ProcessIdentity.parse(record.facts["process"])
        if not process.send(signal.SIGQUIT if now else signal.SIGTERM):
            raise BackendError(f"job {record.id} does not run on this machine (any more)")
        return f"process {process.pid} ends now" if now else f"process {process.pid} saves and ends"
