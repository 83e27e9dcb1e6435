"""What Slurm runs on each node of a job: the node's agent, in the place that Slurm gave it.

submitit pickles a `SlurmTask` by its import path with one string in it, so nothing of this code travels with the job.
"""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGUSR2

from cluster.agent import NodeAgent, OtherNode, Place, say
from cluster.errors import BackendError
from cluster.first_node import FirstNode, exit_code
from cluster.provision import usable_address
from cluster.slurm_states import run_slurm
from cluster.start_folder import JobSpec, Outcome, StartFolder

REQUEUE_FILE = "requeue"
"""In the job's directory: tells the batch script to requeue. It has Slurm's commands, which a container may lack."""
EXIT_CODE_FILE = "exit_code"
"""There too, of an elastic job: what the batch script ends with."""

STARTS_WITHOUT_PROGRESS = 3
STARTS_PER_ARRAY_TASK = 1000


@dataclass(frozen=True)
class SlurmTask:
    """The callable that submitit sends.

    Attributes:
        job_directory: folder of the job in the run directory.
    """

    job_directory: str

    def __call__(self) -> None:
        """Be the agent of the node that this process is on; ends the process."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        job_directory, slurm = Path(self.job_directory), SlurmJobEnvironment()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        number = STARTS_PER_ARRAY_TASK * int(slurm.array_task_id or 0) + restarts + 1
        folder = StartFolder.of(job_directory, number)
        folder.path.mkdir(exist_ok=True)
        say(f"node {slurm.node} of job {slurm.job_id}: its log is {folder.node_log(slurm.node)}")
        _write_output_to(folder.node_log(slurm.node))
        names = tuple(slurm.hostnames)
        address = usable_address(own_address(slurm.node, names), slurm.node)
        place = Place(slurm.node, names, address, f"slurm/{slurm.raw_job_id}")
        spec = replace(JobSpec.read(job_directory), nodes=len(names))  # of --nodes=MIN-MAX what there was
        agent_class: type[NodeAgent] = SlurmOtherNode if slurm.node else SlurmFirstNode
        outcome = agent_class(spec, job_directory, folder, place).run()
        raise SystemExit(exit_code(outcome))


class SlurmFirstNode(FirstNode):
    """Has the job requeued when it was Slurm that wanted its machines back."""

    def leave(self, outcome: Outcome) -> None:
        """See `NodeAgent.leave`."""
        outcome = replace(outcome, progress=_progress(self.spec))
        if outcome.state == "stopped" and (SIGUSR2 in self.signals or _is_preempted()):
            idle = _starts_without_progress(self.job_directory, self.folder, outcome.progress)
            if idle < STARTS_WITHOUT_PROGRESS:
                outcome = replace(outcome, requeue=True, message=f"{outcome.message}, to be requeued")
                (self.job_directory / REQUEUE_FILE).touch()
            else:
                outcome = replace(
                    outcome,
                    state="failed",
                    message=f"{_given_up(idle)}. "
                    "Give it more time (slurm.time_limit), or let it save sooner (checkpoint.save_steps)",
                )
            say(outcome.message)
        if self.spec.min_nodes is not None:  # srun's own code tells of the nodes that were lost
            (self.job_directory / EXIT_CODE_FILE).write_text(str(exit_code(outcome)))
        super().leave(outcome)


class SlurmOtherNode(OtherNode):
    """Has the job requeued when its first node is lost, which an elastic job outlives and cannot go on without."""

    def leave(self, outcome: Outcome) -> None:
        """See `NodeAgent.leave`."""
        lost = outcome.state == "failed" and self.spec.min_nodes is not None and self.first_node_is_lost()
        if not lost or not self.folder.is_first("requeue"):
            return
        progress = _progress(self.spec)
        idle = _starts_without_progress(self.job_directory, self.folder, progress)
        again = idle < STARTS_WITHOUT_PROGRESS
        message = f"{outcome.message}; {'to be requeued' if again else _given_up(idle)}"
        say(message)
        self.folder.forget_head()
        self.folder.end(replace(outcome, message=message, requeue=again, progress=progress))
        command = ["scontrol", "requeue"] if again else ["scancel"]
        try:
            run_slurm(*command, os.environ["SLURM_JOB_ID"])
        except BackendError as error:
            say(f"{error}; submit the job again to go on")


def _given_up(starts: int) -> str:
    return f"{starts} starts in a row ended before a new checkpoint; the job is not requeued any more"


def _progress(spec: JobSpec) -> str:
    """What the run has saved; differs after every save."""
    folder = Path(spec.progress_directory)
    return " ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""


def _starts_without_progress(job_directory: Path, current: StartFolder, progress: str) -> int:
    """How many starts in a row, the current one included, have ended with these checkpoints."""
    count = 1
    for folder in reversed(StartFolder.all_of(job_directory)):
        past = folder.outcome()
        if folder.path == current.path or past is None:
            continue
        if past.progress != progress:
            break
        count += 1
    return count


def _is_preempted() -> bool:
    """Whether Slurm wants the nodes for another job; SIGTERM alone doesn't say, it also comes with scancel."""
    command = ["scontrol", "show", "job", os.environ.get("SLURM_JOB_ID", ""), "--oneliner"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    return fields.get("PreemptTime", "None") != "None"


def own_address(index: int, names: tuple[str, ...]) -> str:
    """The address at which the job's other nodes reach this one.

    What its name means, unless that is loopback, as Debian gives the machine's own name; then the address from which a
    packet to another node leaves; failing that what Slurm says.
    """
    own = resolve(names[index])
    if own and not own.startswith("127."):
        return own
    for name in names:
        peer = resolve(name)
        if peer and not peer.startswith("127."):
            return _source_address(peer)
    return own or "127.0.0.1"


def resolve(name: str) -> str | None:
    """The IPv4 address of a node, from the resolver or from Slurm, which may know it by another name."""
    for candidate in (name, _slurm_address(name)):
        try:
            return socket.gethostbyname(candidate) if candidate else None
        except OSError:
            continue
    return None


def _slurm_address(name: str) -> str:
    try:
        command = ["scontrol", "show", "node", name, "--oneliner"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((word.removeprefix("NodeAddr=") for word in shown.split() if word.startswith("NodeAddr=")), "")


def _source_address(peer: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing: it only looks up the route
        return str(probe.getsockname()[0])


def _write_output_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
