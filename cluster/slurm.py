"""Jobs of a Slurm cluster, submitted through submitit: one task a node, each of them a node's agent.

Works where accounting (sacct) is not available: states come from squeue and from the job's own files.
"""

import contextlib
import io
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BackendError
from cluster.job_files import log_of, make_job_directory, node_names, spec_of, status_from_files
from cluster.slurm_states import EXPLANATIONS, SlurmJob, ask_sacct, ask_squeue, run_slurm
from cluster.slurm_task import EXIT_CODE_FILE, REQUEUE_FILE, SlurmTask
from cluster.start_folder import last_start
from cluster.types import JobRecord, JobRequest, JobState, JobStatus, Log, Submission

if TYPE_CHECKING:  # see cluster.types
    from cluster.profile_sections import ContainerSection, SlurmSection

SIGNAL_SLACK_S = 60
"""sbatch(1), --signal: the signal may come this much earlier than said."""

RAY_BYTES = 2**30
"""What Ray's own processes and its object store take on a node, beside the workers."""

OUTPUT_LINES = 5
"""Of the batch script's output, in the reason of a job that ended before its first node's agent began."""

ALREADY_GONE = "Invalid job id specified"
"""What scancel says of a job that has ended."""


class SlurmBackend:
    """Submits through sbatch, asks squeue, cancels through scancel."""

    def render(self, request: JobRequest) -> str:
        """See `Backend.render`: the batch script, byte for byte as sbatch gets it."""
        executor = _executor(request)
        # The method that submitit itself calls when it submits; it has no public name for it.
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def submit(self, request: JobRequest) -> Submission:
        """See `Backend.submit`."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = _executor(request)
        make_job_directory(request.job_directory)
        spec_of(request).write(request.job_directory)
        try:
            # submitit repeats on stderr what its error says. Slurm hands the environment of sbatch on to the job.
            with contextlib.redirect_stderr(io.StringIO()), _environment(request.profile.secrets):
                job_id = str(executor.submit(SlurmTask(str(request.job_directory))).job_id)
        except FileNotFoundError as error:
            shutil.rmtree(request.job_directory)
            raise BackendError("sbatch is not installed here: is this a machine of the Slurm cluster?") from error
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(request.job_directory)
            raise BackendError(
                f"sbatch refused the job: {_message(error)}\nIt was sent:\n{self.render(request)}"
            ) from error
        for task in _array_tasks(request.profile.slurm.options.get("array")):
            pickle = request.job_directory / f"{job_id}_submitted.pkl"
            pickle.with_name(f"{job_id}_{task}_submitted.pkl").symlink_to(pickle.name)
        return Submission(job_id)

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobStatus]:
        """See `Backend.states`."""
        try:
            known = ask_squeue()
        except BackendError as error:
            return {record.id: _without_slurm(record, str(error)) for record in records}
        told = {record.id: status_from_files(record) for record in records if record.backend_id not in known}
        forgotten = [
            record.backend_id for record in records if record.id in told and not told[record.id].state.is_final
        ]
        if forgotten:
            known.update(ask_sacct(forgotten))
        return {
            record.id: _combine(record, known[record.backend_id])
            if record.backend_id in known
            else _forgotten(told[record.id])
            for record in records
        }

    def log(self, record: JobRecord, node: int, start: int | None) -> Log:
        """See `Backend.log`."""
        return log_of(record, node, start)

    def cancel(self, record: JobRecord, *, now: bool) -> str:
        """See `Backend.cancel`."""
        if now:
            run_slurm("scancel", record.backend_id)
            return f"Slurm job {record.backend_id} is cancelled"
        run_slurm("scancel", "--state=PENDING", record.backend_id)
        try:
            # To the job's steps alone: the agent of the first node hands it on to the driver, which saves.
            run_slurm("scancel", "--state=RUNNING", "--signal=TERM", record.backend_id)
        except BackendError as error:
            if ALREADY_GONE not in str(error):  # what had waited is gone by now
                raise
        return f"Slurm job {record.backend_id} saves and ends; if it still waits, it is cancelled"


def _executor(request: JobRequest) -> Any:
    """The submitit executor of a request.

    Raises:
        BackendError: Slurm cannot name the job's folder, or would warn as soon as the job starts.
    """
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]  # submitit has no types
        """Renders where Slurm is not installed, too, and `--nodes=MIN-MAX`."""

        @classmethod
        def affinity(cls) -> int:
            return 1

        def _num_tasks(self) -> int:
            return request.nodes

    if bad := sorted({character for character in str(request.job_directory) if character in "%\n\r\\"}):
        raise BackendError(
            f"run directory {str(request.run_directory)!r}: Slurm cannot write logs into a path that holds "
            f"{', '.join(map(repr, bad))}; name another one with --run-dir"
        )
    slurm, fewest = request.profile.slurm, request.profile.min_nodes
    minutes = slurm.time_limit_minutes
    if minutes is not None and minutes * 60 <= request.save_before_end_seconds + SIGNAL_SLACK_S:
        raise BackendError(
            f"fault_tolerance.save_before_end_seconds is {request.save_before_end_seconds}, and Slurm may warn "
            f"{SIGNAL_SLACK_S} s earlier, but slurm.time_limit {slurm.time_limit} is all the time that a job has; "
            "raise the limit, or lower save_before_end_seconds"
        )
    executor = Executor(folder=request.job_directory, python=_python(slurm.container))
    parameters: dict[str, Any] = {
        "job_name": request.name,
        "nodes": request.nodes if fewest is None else f"{fewest}-{request.nodes}",
        "ntasks_per_node": None if _is_range(request) else 1,
        "cpus_per_task": math.ceil(request.cpus_per_node),
        "gpus_per_node": request.gpus_per_node if request.gpus_per_node and slurm.gres is None else None,
        "time": minutes,
        "mem": _memory(request),
        "exclusive": slurm.exclusive or None,
        "signal_delay_s": request.save_before_end_seconds,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": list(slurm.setup) or None,
        "teardown": _last_lines(request),
        "srun_args": [*_srun_arguments(request), *_container_arguments(slurm.container), *slurm.srun_arguments],
        "additional_parameters": _options(request),
        **_plain_options(slurm),
    }
    executor.update_parameters(**parameters)
    return executor


def _options(request: JobRequest) -> dict[str, Any]:
    """Options of sbatch that submitit does not know; one that is set to false is left out."""
    own = {"requeue": True, "no-kill": _outlives_nodes(request), "chdir": str(request.run_directory)}
    options = {**own, **request.profile.slurm.options}
    return {name: value for name, value in options.items() if value is not False}


def _memory(request: JobRequest) -> str | None:
    if request.memory_per_node is None:
        return request.profile.slurm.memory_per_node
    return f"{math.ceil((request.memory_per_node + RAY_BYTES) / 2**20)}M"


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Have more in this process's environment for a moment."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _plain_options(slurm: "SlurmSection") -> dict[str, str | None]:
    names = ("partition", "account", "qos", "constraint", "exclude", "nodelist", "gres", "dependency")
    return {name: getattr(slurm, name) for name in names}


def _python(container: "ContainerSection | None") -> str:
    """The command that starts Python in the job, -P so that no file of the working directory shadows a module."""
    if container is None:
        return f"{shlex.quote(sys.executable)} -P"
    if container.runtime == "pyxis":
        return f"{shlex.quote(container.python)} -P"
    mounts = [part for mount in container.mounts for part in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", *mounts, *container.arguments, container.image, container.python, "-P"])


def _container_arguments(container: "ContainerSection | None") -> list[str]:
    if container is None or container.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, *container.arguments]


def _is_range(request: JobRequest) -> bool:
    """Whether Slurm may give fewer nodes than most; it gives the fewest where sbatch is told the tasks of a node."""
    return request.profile.min_nodes is not None and request.profile.min_nodes < request.nodes


def _outlives_nodes(request: JobRequest) -> bool:
    """Whether the job goes on without nodes that Slurm loses: it is elastic, and its agents can ask for a requeue."""
    slurm = request.profile.slurm
    return _is_range(request) and slurm.container is None and slurm.options.get("no-kill") is not False


def _srun_arguments(request: JobRequest) -> list[str]:
    tasks = ["--ntasks-per-node=1"] if _is_range(request) else []
    return [*tasks, "--no-kill" if _outlives_nodes(request) else "--kill-on-bad-exit=1"]


def _last_lines(request: JobRequest) -> list[str]:
    """The end of the batch script. It requeues, and not the agent, which may run in a container without Slurm."""
    mark = shlex.quote(str(request.job_directory / REQUEUE_FILE))
    code = shlex.quote(str(request.job_directory / EXIT_CODE_FILE))
    lost = [f"if [ -e {code} ]; then status=$(cat {code}); rm -f {code}; fi"] if _outlives_nodes(request) else []
    return [
        "status=$?",
        *lost,
        f"if [ -e {mark} ]; then",
        f"  rm -f {mark}",
        '  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm refuses to requeue the job; submit it again to go on" >&2',
        "fi",
        'exit "$status"',
    ]


def _array_tasks(specification: object) -> list[int]:
    """Indices of an array such as `1-3,7%1`, in sbatch's notation."""
    tasks: list[int] = []
    for part in str(specification or "").partition("%")[0].split(","):
        if part:
            bounds, _, step = part.partition(":")
            first, _, last = bounds.partition("-")
            tasks.extend(range(int(first), int(last or first) + 1, int(step or 1)))
    return tasks


def _message(error: Exception) -> str:
    """What sbatch wrote, out of submitit's wrapping."""
    lines = [line for line in str(error).splitlines() if line.startswith("sbatch:")]
    return "\n".join(line.removeprefix("sbatch: ") for line in lines) or str(error).strip()


def _combine(record: JobRecord, job: SlurmJob) -> JobStatus:
    """What Slurm says, and the job's own word on how it ended."""
    told = status_from_files(record)
    start = last_start(Path(record.job_directory))
    outcome = start.outcome() if start else None
    nodes = (job.nodes,) if job.nodes else ()
    match job.ours:
        case JobState.PENDING:
            return JobStatus(JobState.PENDING, job.state, job.reason, (), told.starts, job.expected_start)
        case JobState.RUNNING:
            reason = told.reason if told.state is JobState.RUNNING else ""
            return JobStatus(JobState.RUNNING, job.state, reason, node_names(record) or nodes, told.starts)
        case JobState.FAILED if outcome is not None and outcome.requeue:
            reason = "it saved, but Slurm did not requeue it; submit it again to go on"
            return JobStatus(JobState.STOPPED, job.state, reason, nodes, told.starts)
        case JobState.FAILED if outcome is not None and job.state == "FAILED":
            return JobStatus(told.state, job.state, told.reason, nodes, told.starts)
        case JobState.FAILED if start is None:
            reason = EXPLANATIONS.get(job.state) or _before_any_start(record, job)
            return JobStatus(JobState.FAILED, job.state, reason, nodes)
        case state:
            reason = EXPLANATIONS.get(job.state, outcome.message if outcome else job.reason)
            return JobStatus(state, job.state, reason, nodes, told.starts)


def _before_any_start(record: JobRecord, job: SlurmJob) -> str:
    """Why a job has failed of which no agent says anything: what its batch script wrote, if it could."""
    outputs = [(path, path.read_text(errors="replace")) for path in Path(record.job_directory).glob("*_log.out")]
    for path, text in sorted(outputs, key=lambda output: output[0].stat().st_mtime, reverse=True):
        if lines := text.strip().splitlines():
            return "\n".join([f"it failed before ZeroFleet began on its nodes; {path} ends:", *lines[-OUTPUT_LINES:]])
    return f"nothing was written to {record.job_directory}; do its nodes ({job.nodes}) see that folder?"


def _forgotten(told: JobStatus) -> JobStatus:
    """A job that Slurm has no memory of: its own word, if it left one."""
    if told.state.is_final:
        return told
    reason = "Slurm has forgotten it, accounting says nothing, and it left no word on how it ended"
    return JobStatus(JobState.UNKNOWN, "", reason, told.nodes, told.starts)


def _without_slurm(record: JobRecord, why: str) -> JobStatus:
    told = status_from_files(record)
    return told if told.state.is_final else JobStatus(JobState.UNKNOWN, "", why, told.nodes, told.starts)
