"""What backends that share the run directory with their nodes have in common: a job's folder, its state, its logs."""

from pathlib import Path

from cluster.errors import BackendError
from cluster.start_folder import JobSpec, StartFolder, last_start
from cluster.types import FileLog, JobRecord, JobRequest, JobState, JobStatus, Log

_STATES = {
    "completed": JobState.COMPLETED,
    "stopped": JobState.STOPPED,
    "cancelled": JobState.CANCELLED,
    "failed": JobState.FAILED,
}


def make_job_directory(path: Path) -> None:
    """Make the folder of a new job.

    Raises:
        BackendError: it is there already, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError as error:
        raise BackendError(f"{path} exists: another job was submitted at this moment; try again") from error
    except OSError as error:
        raise BackendError(f"{path} cannot be made: {error.strerror or error}") from error


def spec_of(
    request: JobRequest, *, addresses: tuple[str, ...] = (), names: tuple[str, ...] = (), spawn_peers: bool = False
) -> JobSpec:
    """What a job's nodes need to know of a request."""
    profile = request.profile
    return JobSpec(
        name=request.name,
        argv=request.argv,
        environment=profile.plain_environment,
        secret_names=tuple(sorted(profile.secrets)),
        working_directory=str(request.run_directory),
        nodes=request.nodes,
        cpus_per_node=request.cpus_per_node,
        gpus_per_node=request.gpus_per_node,
        memory_per_node=request.memory_per_node,
        min_nodes=profile.min_nodes,
        join_timeout_s=profile.join_timeout_seconds,
        dashboard=profile.dashboard,
        progress_directory=str(request.progress_directory),
        addresses=addresses,
        names=names,
        spawn_peers=spawn_peers,
        node_timeout_s=request.node_timeout_seconds,
    )


def status_from_files(record: JobRecord) -> JobStatus:
    """What a job's own files say: how it ended, or what it is about (state RUNNING then, which nobody has checked)."""
    job_directory = Path(record.job_directory)
    start = last_start(job_directory)
    if start is None:
        return JobStatus(JobState.UNKNOWN, reason=f"nothing in {job_directory} says that it ever started")
    number = len(StartFolder.all_of(job_directory))
    outcome = start.outcome()
    if outcome is not None and not outcome.requeue:
        return JobStatus(_STATES[outcome.state], outcome.state, outcome.message, node_names(record), number)
    if outcome is not None:
        return JobStatus(JobState.PENDING, "requeued", outcome.message, (), number)
    return JobStatus(JobState.RUNNING, "", doing(start), node_names(record), number)


def doing(start: StartFolder) -> str:
    """What a start is about until the driver tells more."""
    phases = start.phases()
    if "driver_started" in phases:
        return ""
    if "ray_head" in phases:
        return "waiting for Ray on all nodes"
    return "starting Ray" if phases else ""


def node_names(record: JobRecord) -> tuple[str, ...]:
    """Names of a job's machines, as far as they have reported."""
    start = last_start(Path(record.job_directory))
    reports = [] if start is None else [start.node(index) for index in range(record.nodes)]
    return tuple(report.name for report in reports if report is not None)


def log_of(record: JobRecord, node: int, start: int | None) -> Log:
    """See `Backend.log`."""
    if not 0 <= node < record.nodes:
        raise BackendError(f"job {record.id} has nodes 0 to {record.nodes - 1}, and no node {node}")
    starts = StartFolder.all_of(Path(record.job_directory))
    if start is None:
        folder = starts[-1] if starts else StartFolder.of(Path(record.job_directory), 1)
        return FileLog(folder.node_log(node))
    if not 1 <= start <= len(starts):
        raise BackendError(f"job {record.id} has been started {len(starts)} times, and {start} is none of these")
    return FileLog(starts[start - 1].node_log(node))
