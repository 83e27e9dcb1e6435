"""From a job's directory to the agents of its nodes: in this process, or detached from it.

python -P -m cluster.provision JOB_DIRECTORY --node INDEX [--detach]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.agent import NodeAgent, OtherNode, Place, ProvisionError, agent_command
from cluster.errors import ExpectedError
from cluster.first_node import FirstNode, exit_code
from cluster.processes import ProcessIdentity
from cluster.start_folder import JobSpec, StartFolder


def make_agent(spec: JobSpec, job_directory: Path, folder: StartFolder, place: Place) -> NodeAgent:
    """The agent for a place."""
    agent_class = FirstNode if place.index == 0 else OtherNode
    return agent_class(spec, job_directory, folder, place)


def usable_address(address: str, index: int) -> str:
    """An address under which Ray lets a node stand.

    Ray replaces 127.0.0.1 by the machine's outside address. On a machine that plays several nodes, each gets its own.
    """
    return f"127.0.1.{1 + index}" if address.startswith("127.") else address


def start_detached(
    job_directory: Path, index: int, secret: Mapping[str, str] | None = None, timeout_s: float = 20.0
) -> ProcessIdentity:
    """Start a node's agent so that it outlives this process and its terminal; returns once it is known to run.

    Args:
        job_directory: of the job.
        index: of the node.
        secret: more environment, which no file may hold.
        timeout_s: how long to wait for the agent's first word.

    Raises:
        ProvisionError: it ended at once; the text holds what it wrote.
    """
    folder = StartFolder.of(job_directory, 1)
    folder.path.mkdir(exist_ok=True)
    with folder.node_log(index).open("ab") as output:
        process = subprocess.Popen(
            agent_command(job_directory, index),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**os.environ, **(secret or {})},
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while folder.node(index) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise ProvisionError(f"the agent of node {index} did not start: {folder.node_log(index).read_text()}")
        time.sleep(0.02)
    return ProcessIdentity.of(process.pid)


def main(argv: list[str] | None = None) -> int:
    """Be the agent of a node, or start one that outlives this process."""
    parser = argparse.ArgumentParser(prog="python -P -m cluster.provision", description=main.__doc__)
    parser.add_argument("job_directory", type=Path)
    parser.add_argument("--node", type=int, required=True, help="index of the node")
    parser.add_argument("--detach", action="store_true", help="start the agent, print which process it is, and leave")
    parser.add_argument("--secrets", action="store_true", help="read more environment from standard input, as JSON")
    options = parser.parse_args(argv)
    try:
        spec = JobSpec.read(options.job_directory)
        if options.detach:
            secret = json.loads(sys.stdin.readline()) if options.secrets else {}
            print(start_detached(options.job_directory, options.node, secret))  # noqa: T201 - read by the ssh backend
            return 0
        folder = StartFolder.of(options.job_directory, 1)
        folder.path.mkdir(exist_ok=True)
        place = _place(spec, options.node, options.job_directory)
        return exit_code(make_agent(spec, options.job_directory, folder, place).run())
    except ExpectedError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _place(spec: JobSpec, index: int, job_directory: Path) -> Place:
    hostname = socket.gethostname()
    names = spec.names or tuple(hostname if spec.nodes == 1 else f"{hostname}/{node}" for node in range(spec.nodes))
    return Place(index, names, usable_address(_own_address(spec, index), index), f"{os.getuid()}{job_directory}")


def _own_address(spec: JobSpec, index: int) -> str:
    """The address given for this node, or the one at which ssh reached this machine."""
    if spec.addresses:
        return spec.addresses[index]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return connection[2] if len(connection) == 4 else "127.0.0.1"


if __name__ == "__main__":
    sys.exit(main())
