"""The Jobs API as it may answer: of another version, closed, gone, or forgetful. The server is a fake, HTTP is real."""

import json
import platform
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from ray._private import ray_constants

from cluster.errors import BackendError
from cluster.ray_jobs import RAYS_EXCLUDES, RayJobsBackend, check_versions
from cluster.types import JobState

BACKEND = RayJobsBackend()


class Api:
    """Answers by path, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, object]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                api.asked.append((self.command, self.path, self.headers.get("Authorization")))
                code, content = api.answers.get(self.path, (404, "not found"))
                self.send_response(code)
                self.end_headers()
                self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

            do_GET = do_POST = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def metadata(self, ray: str, python: str) -> None:
        self.answers["/api/v0/cluster_metadata"] = (200, {"data": {"rayVersion": ray, "pythonVersion": python}})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    server = Api()
    server.thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


RAY, PYTHON = version("ray"), platform.python_version()
OTHER_PATCH = f"{PYTHON.rpartition('.')[0]}.99"


def test_the_same_versions_are_let_through(api: Api):
    api.metadata(RAY, OTHER_PATCH)
    check_versions(api.url)


@pytest.mark.parametrize(
    ("ray", "python", "told"),
    [
        ("2.9.0", PYTHON, f"runs Ray 2.9.0 (here: {RAY}); use the same versions"),
        (RAY, "3.8.1", f"runs Python 3.8.1 (here: {PYTHON}); use the same versions"),
        ("2.9.0", "3.8.1", f"runs Ray 2.9.0 (here: {RAY}), Python 3.8.1 (here: {PYTHON})"),
        ("", PYTHON, "runs Ray unknown"),
    ],
)
def test_other_versions_are_named_before_anything_is_sent(api: Api, make_request, ray, python, told):
    api.metadata(ray, python)
    request = make_request(backend="ray", ray={"dashboard_address": api.url})
    with pytest.raises(BackendError) as caught:
        BACKEND.submit(request)
    assert told in str(caught.value)
    assert [(method, path) for method, path, _ in api.asked] == [("GET", "/api/v0/cluster_metadata")]
    assert not request.job_directory.exists()


def test_a_cluster_that_wants_a_token(api: Api, make_request, monkeypatch):
    api.answers["/api/v0/cluster_metadata"] = (401, "Unauthorized")
    request = make_request(backend="ray", ray={"dashboard_address": api.url})
    with pytest.raises(BackendError, match="answers 401: Unauthorized; set RAY_AUTH_TOKEN"):
        BACKEND.submit(request)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    with pytest.raises(BackendError):
        BACKEND.submit(request)
    assert [token for _, _, token in api.asked] == [None, "Bearer sesame"]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9"),
        ("somewhere", "no Ray cluster answers at somewhere"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9/api/v0/cluster_metadata does not answer"),
        (None, "set address, ray.dashboard_address, or RAY_ADDRESS in the environment"),
    ],
)
def test_an_address_at_which_nothing_answers(make_request, monkeypatch, address, told):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    request = make_request(backend="ray", **({"address": address} if address else {}))
    with pytest.raises(BackendError) as caught:
        BACKEND.submit(request)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        ({"status": "PENDING", "message": "Job has not started yet."}, JobState.PENDING, "Job has not started yet."),
        ({"status": "RUNNING", "message": "Job is currently running.", "start_time": 1}, JobState.RUNNING, ""),
        ({"status": "SUCCEEDED", "message": "Job finished."}, JobState.COMPLETED, "Job finished."),
        ({"status": "STOPPED", "message": ""}, JobState.CANCELLED, ""),
        ({"status": "FAILED", "message": "exit code 1", "driver_exit_code": 1}, JobState.FAILED, "exit code 1"),
        (
            {"status": "FAILED", "message": "exit code 130", "driver_exit_code": 130},
            JobState.STOPPED,
            "saved and ended",
        ),
        ({"status": "DREAMING", "message": ""}, JobState.UNKNOWN, ""),
        (None, JobState.UNKNOWN, "does not know it; was the cluster started anew?"),
    ],
)
def test_states(api: Api, make_record, job, state, reason):
    api.answers["/api/jobs/"] = (200, [] if job is None else [{"submission_id": "raysubmit_1", **job}])
    record = make_record(backend="ray", backend_id="raysubmit_1", facts={"url": api.url})
    found = BACKEND.states([record])[record.id]
    assert found.state is state
    assert reason in found.reason


def test_one_question_a_cluster_and_a_silent_one_does_not_hide_the_other(api: Api, make_record):
    api.answers["/api/jobs/"] = (
        200,
        [{"submission_id": f"raysubmit_{index}", "status": "RUNNING"} for index in (1, 2)],
    )
    here = [
        make_record(id=f"job{i}", backend="ray", backend_id=f"raysubmit_{i}", facts={"url": api.url}) for i in (1, 2)
    ]
    gone = make_record(id="gone", backend="ray", backend_id="raysubmit_3", facts={"url": "http://127.0.0.1:9"})
    found = BACKEND.states([*here, gone])
    assert [found[name].state for name in ("job1", "job2", "gone")] == [
        JobState.RUNNING,
        JobState.RUNNING,
        JobState.UNKNOWN,
    ]
    assert len(api.asked) == 1


def test_the_log_goes_on_where_it_was_left(api: Api, make_record):
    record = make_record(backend="ray", backend_id="raysubmit_1", facts={"url": api.url})
    api.answers["/api/jobs/raysubmit_1/logs"] = (200, {"logs": "füf\n"})
    log = BACKEND.log(record, 0, None)
    first = log.read(0)
    assert first.decode() == "füf\n"
    api.answers["/api/jobs/raysubmit_1/logs"] = (200, {"logs": "füf\nsix\n"})
    assert log.read(len(first)) == b"six\n"
    with pytest.raises(BackendError, match="one log here, the driver's"):
        BACKEND.log(record, 1, None)


def test_cancel_asks_the_driver_and_now_asks_ray(api: Api, make_record):
    record = make_record(backend="ray", backend_id="raysubmit_1", facts={"url": api.url})
    BACKEND.cancel(record, now=False)
    assert (Path(record.job_directory) / "stop").exists()
    assert api.asked == []
    api.answers["/api/jobs/raysubmit_1/stop"] = (200, {"stopped": True})
    BACKEND.cancel(record, now=True)
    assert api.asked[-1][:2] == ("POST", "/api/jobs/raysubmit_1/stop")


def test_what_is_sent_and_what_is_left_out_are_shown(make_request, tmp_path: Path):
    section = {"working_directory": str(tmp_path), "excludes": ["*.ckpt", "/data/"], "requirements": ["einops==0.8"]}
    (tmp_path / ".gitignore").write_text("# what is made\n\nruns/\n*.log\n")
    (tmp_path / ".rayignore").write_text("notes\n")
    request = make_request(
        backend="ray", ray={**section, "python": "python3"}, argv=("/here/python", "-P", "-m", "driver")
    )
    shown = json.loads(BACKEND.render(request))
    assert ray_constants.get_runtime_env_default_excludes() == list(RAYS_EXCLUDES)
    assert shown["entrypoint"] == "python3 -P -m driver"
    assert shown["runtime_env"]["working_dir"] == str(tmp_path)
    left_out = [*RAYS_EXCLUDES, "runs/", "*.log", "notes", "*.ckpt", "/data/"]
    assert shown["runtime_env"]["excludes"] == left_out
    assert shown["runtime_env"]["pip"] == ["einops==0.8"]


def test_the_dry_run_shows_no_secret(make_request):
    request = make_request(backend="ray", environment={"HF_TOKEN": "hunter2", "NCCL_DEBUG": "INFO"})
    shown = BACKEND.render(request)
    assert "hunter2" not in shown
    variables = json.loads(shown)["runtime_env"]["env_vars"]
    assert (variables["HF_TOKEN"], variables["NCCL_DEBUG"]) == ("<redacted>", "INFO")
