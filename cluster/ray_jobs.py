"""Jobs on a Ray cluster that runs already, through its Jobs API; the driver runs there as the job's entrypoint.

Submitting takes Ray's own client, which packs and sends the working directory. Looking and cancelling is plain HTTP, so
that a status needs no import of Ray, which takes seconds.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.errors import BackendError
from cluster.first_node import STOPPED
from cluster.job_files import make_job_directory
from cluster.ray_node import accepts_connections
from cluster.types import (
    STOP_FILE_VARIABLE,
    JobRecord,
    JobRequest,
    JobState,
    JobStatus,
    Log,
    Submission,
)

TIMEOUT_S = 10.0
STOP_FILE = "stop"
"""In the job's directory: while it is there the driver is asked to save and end. Ray itself would give it 3 seconds."""

HIDDEN = "<redacted>"
RAYS_EXCLUDES = (".git", ".venv", "venv", "__pycache__")
"""What Ray never sends: RAY_RUNTIME_ENV_DEFAULT_EXCLUDES of `ray/_private/ray_constants.py`."""

STATES = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.COMPLETED,
    "STOPPED": JobState.CANCELLED,
    "FAILED": JobState.FAILED,
}
"""Ray's job states as ours."""


class RayJobsBackend:
    """Submits to the Jobs API of the cluster that the profile or RAY_ADDRESS names."""

    def render(self, request: JobRequest) -> str:
        """See `Backend.render`: the request as JSON, with secrets taken out."""
        job = _job(request)
        shown = dict.fromkeys(request.profile.secrets, HIDDEN)
        job["runtime_env"]["env_vars"] = {**job["runtime_env"]["env_vars"], **shown}
        return json.dumps(job, indent=2) + "\n"

    def submit(self, request: JobRequest) -> Submission:
        """See `Backend.submit`."""
        url = api_url(request)
        check_versions(url)
        make_job_directory(request.job_directory)
        from ray.job_submission import JobSubmissionClient

        try:
            job_id = JobSubmissionClient(url, headers=_headers() or None).submit_job(**_job(request))
        except (RuntimeError, ValueError, ConnectionError, OSError) as error:
            shutil.rmtree(request.job_directory)
            raise BackendError(
                f"the Ray cluster at {url} refused the job: {error}\nIt was sent:\n{self.render(request)}"
            ) from error
        return Submission(str(job_id), {"url": url})

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobStatus]:
        """See `Backend.states`: one question a cluster."""
        result: dict[str, JobStatus] = {}
        for url in {record.facts["url"] for record in records}:
            mine = [record for record in records if record.facts["url"] == url]
            try:
                jobs = {job["submission_id"]: job for job in _ask(f"{url}/api/jobs/")}
            except BackendError as error:
                result |= {record.id: JobStatus(JobState.UNKNOWN, reason=str(error)) for record in mine}
                continue
            result |= {record.id: _status(record, jobs.get(record.backend_id)) for record in mine}
        return result

    def log(self, record: JobRecord, node: int, start: int | None) -> Log:
        """See `Backend.log`; Ray keeps the log of the driver, and each rank's is in the run directory."""
        if node != 0 or start not in (None, 1):
            raise BackendError(f"job {record.id} has one log here, the driver's; a worker's is shown with --rank")
        return RayJobLog(record.facts["url"], record.backend_id)

    def cancel(self, record: JobRecord, *, now: bool) -> str:
        """See `Backend.cancel`."""
        if now:
            _ask(f"{record.facts['url']}/api/jobs/{record.backend_id}/stop", method="POST")
            return f"Ray job {record.backend_id} ends now"
        (Path(record.job_directory) / STOP_FILE).touch()
        return f"Ray job {record.backend_id} saves and ends"


@dataclass(frozen=True)
class RayJobLog:
    """The driver's output as the Jobs API gives it: always whole."""

    url: str
    job_id: str

    @property
    def name(self) -> str:
        """The address."""
        return f"{self.url}/api/jobs/{self.job_id}/logs"

    def read(self, offset: int) -> bytes:
        """See `Log.read`."""
        return str(_ask(self.name).get("logs") or "").encode()[offset:]


def _job(request: JobRequest) -> dict[str, Any]:
    """The arguments of `JobSubmissionClient.submit_job`."""
    section, profile = request.profile.ray, request.profile
    runtime_env: dict[str, Any] = {
        "env_vars": {**profile.environment, STOP_FILE_VARIABLE: str(request.job_directory / STOP_FILE)}
    }
    if section.working_directory is not None:
        runtime_env["working_dir"] = str(Path(section.working_directory).expanduser().absolute())
        runtime_env["excludes"] = [*_ignored(Path(runtime_env["working_dir"])), *section.excludes]
    if section.requirements:
        runtime_env["pip"] = list(section.requirements)
    return {
        "entrypoint": shlex.join([section.python, *request.argv[1:]]),
        "runtime_env": runtime_env,
        "metadata": {"name": request.name, "run_directory": str(request.run_directory)},
    }


def _ignored(folder: Path) -> list[str]:
    """What Ray leaves out of a working directory without being told: said outright, so that the request shows it."""
    patterns = list(RAYS_EXCLUDES)
    for name in (".gitignore", ".rayignore"):
        with contextlib.suppress(FileNotFoundError):
            lines = (line.strip() for line in (folder / name).read_text().splitlines())
            patterns += [line for line in lines if line and not line.startswith("#")]
    return patterns


def api_url(request: JobRequest) -> str:
    """Where the Jobs API of a request's cluster listens.

    Raises:
        BackendError: no cluster is named, or it does not answer.
    """
    profile = request.profile
    address = profile.ray.dashboard_address or profile.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise BackendError(
            f"profile {profile.name}: set address, ray.dashboard_address, or RAY_ADDRESS in the environment"
        )
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    if not address.rpartition(":")[2].isdigit() or not accepts_connections(address, timeout_s=5):
        raise BackendError(
            f"no Ray cluster answers at {address} (HOST:PORT of its head, or http://HOST:8265 of its dashboard)"
        )
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return str(ray_address_to_api_server_url(address))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"the Ray cluster at {address} does not say where its dashboard is: {error}") from error


def check_versions(url: str) -> None:
    """Refuse a cluster of another Ray or Python before anything is sent: the driver could not join it.

    Raises:
        BackendError: it is another one, or does not answer.
    """
    metadata = _ask(f"{url}/api/v0/cluster_metadata").get("data", {})
    own = {"Ray": version("ray"), "Python": platform.python_version()}
    theirs = {"Ray": metadata.get("rayVersion", ""), "Python": metadata.get("pythonVersion", "")}
    # Ray joins clusters of the same release, and of the same Python up to its minor version.
    same = {
        "Ray": own["Ray"] == theirs["Ray"],
        "Python": own["Python"].split(".")[:2] == theirs["Python"].split(".")[:2],
    }
    if not all(same.values()):
        told = ", ".join(
            f"{name} {theirs[name] or 'unknown'} (here: {own[name]})" for name, equal in same.items() if not equal
        )
        raise BackendError(f"the Ray cluster at {url} runs {told}; use the same versions on both sides")


def _status(record: JobRecord, job: dict[str, Any] | None) -> JobStatus:
    if job is None:
        return JobStatus(JobState.UNKNOWN, reason="the Ray cluster does not know it; was the cluster started anew?")
    state = STATES.get(job["status"], JobState.UNKNOWN)
    reason = (job.get("message") or "").strip() if state is not JobState.RUNNING else ""
    if state is JobState.FAILED and job.get("driver_exit_code") == STOPPED:
        state, reason = JobState.STOPPED, "saved and ended"
    return JobStatus(state, job["status"], reason, starts=1 if job.get("start_time") else 0)


def _headers() -> dict[str, str]:
    """Of Ray's token authentication, when a token is set as for Ray itself."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"):
        if not token and path and Path(path).is_file():
            token = Path(path).read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _ask(url: str, method: str = "GET") -> Any:
    """Ask the API; returns its JSON.

    Raises:
        BackendError: it does not answer, or refuses; the text holds its words.
    """
    request = urllib.request.Request(url, method=method, headers=_headers())  # noqa: S310 - http(s) by api_url
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - as above
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace").strip().splitlines()
        hint = "; set RAY_AUTH_TOKEN to the cluster's token" if error.code in (401, 403) else ""
        raise BackendError(f"{url} answers {error.code}: {words[-1] if words else error.reason}{hint}") from error
    except (OSError, ValueError) as error:
        raise BackendError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error
