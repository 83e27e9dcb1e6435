"""Jobs on this machine: what happens when parts of them fail, and that nothing is left of them."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.errors import BackendError
from cluster.job_files import make_job_directory, spec_of
from cluster.local import LocalBackend
from cluster.processes import ProcessIdentity
from cluster.profile import Profile
from cluster.provision import start_detached, usable_address
from cluster.ray_node import PORTS_PER_NODE, RayStartError, port_block
from cluster.start_folder import NodeReport, StartFolder
from cluster.types import JobRecord, JobRequest, JobState, JobStatus
from tests.jobs.conftest import assert_nothing_left, processes_of, wait_for

pytestmark = pytest.mark.ray

BACKEND = LocalBackend()
SLEEP = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("up", flush=True)
time.sleep(60)
"""
SECRET = "hunter2hunter2"


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., JobRequest]:
    def make(program: str, nodes: int = 1, **profile) -> JobRequest:
        folder = tmp_path / "run"
        folder.mkdir()
        return JobRequest(
            name="test",
            run_directory=folder,
            job_directory=folder / "jobs" / "0001",
            argv=(sys.executable, "-P", "-c", program),
            profile=Profile(nodes=nodes, **profile),
            nodes=nodes,
            cpus_per_node=1.0,
            gpus_per_node=0,
            save_before_end_seconds=60,
            progress_directory=folder / "checkpoints",
        )

    return make


def record_of(request: JobRequest, process: ProcessIdentity) -> JobRecord:
    facts = {"host": os.uname().nodename, "process": str(process)}
    run_directory, job_directory = str(request.run_directory), str(request.job_directory)
    return JobRecord(
        "bakemotu",
        "test",
        "local",
        str(process.pid),
        run_directory,
        job_directory,
        request.argv,
        0.0,
        "local",
        request.nodes,
        facts=facts,
    )


def submit(request: JobRequest) -> JobRecord:
    return record_of(request, ProcessIdentity.parse(BACKEND.submit(request).facts["process"]))


def status(record: JobRecord) -> JobStatus:
    return BACKEND.states([record])[record.id]


def wait_for_end(record: JobRecord, timeout: float = 60) -> JobStatus:
    wait_for(lambda: status(record).state.is_final, f"end; it is {status(record)}", timeout)
    assert_nothing_left(Path(record.run_directory))
    return status(record)


def log(record: JobRecord) -> str:
    return BACKEND.log(record, 0, None).read(0).decode()


@pytest.fixture
def sleeping(make_request: Callable[..., JobRequest]) -> Iterator[JobRecord]:
    """A job whose driver runs. It has a secret, as its profile says, and no file of the job ever has it."""
    request = make_request(SLEEP, environment={"HF_TOKEN": SECRET})
    record = submit(request)
    wait_for(lambda: "\nup\n" in log(record), "driver")
    agent = BACKEND.render(request).splitlines()[1]
    process = psutil.Process(int(record.backend_id))
    assert process.cmdline() == shlex.split(agent), "what the dry run shows"
    (own,) = [child for child in process.children() if child.cmdline() == list(request.argv)]
    assert own.environ()["HF_TOKEN"] == SECRET
    yield record
    ProcessIdentity.parse(record.facts["process"]).send(signal.SIGQUIT)
    wait_for_end(record)
    files = [path for path in request.run_directory.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_failing_driver_fails_the_job_with_its_code_and_words(make_request: Callable[..., JobRequest]):
    record = submit(make_request("import sys; sys.exit('the disk is full')"))
    found = wait_for_end(record)
    assert found.state is JobState.FAILED
    assert found.reason.startswith("the driver ended with code 1; see ")
    assert "the disk is full" in log(record)


def test_cancel_saves_and_ends(sleeping: JobRecord):
    assert status(sleeping).state is JobState.RUNNING
    assert "saves and ends" in BACKEND.cancel(sleeping, now=False)
    assert wait_for_end(sleeping).state is JobState.STOPPED


def test_now_means_now(sleeping: JobRecord):
    BACKEND.cancel(sleeping, now=True)
    assert wait_for_end(sleeping).state is JobState.CANCELLED


def test_a_killed_agent_leaves_a_clear_state_and_no_process(sleeping: JobRecord):
    assert len(processes_of(Path(sleeping.run_directory))) > 3
    os.kill(int(sleeping.backend_id), signal.SIGKILL)
    found = wait_for_end(sleeping)
    assert (found.state, found.native) == (JobState.FAILED, "gone")
    assert "gone without a word" in found.reason


def test_a_job_of_another_machine_is_not_judged_from_here(sleeping: JobRecord):
    elsewhere = replace(sleeping, facts={**sleeping.facts, "host": "laptop"})
    assert status(elsewhere).state is JobState.UNKNOWN
    assert "it is a process of laptop, and this is" in status(elsewhere).reason


def start_first_node_only(request: JobRequest) -> JobRecord:
    """A job of several nodes, of which the first is started and the others are not."""
    make_job_directory(request.job_directory)
    addresses = tuple(usable_address("127.0.0.1", index) for index in range(request.nodes))
    spec_of(request, addresses=addresses, names=("n1", "n2", "n3")[: request.nodes]).write(request.job_directory)
    return record_of(request, start_detached(request.job_directory, 0))


def test_a_node_that_never_comes_up_is_named(make_request: Callable[..., JobRequest]):
    record = start_first_node_only(make_request(SLEEP, nodes=3, join_timeout_seconds=12.0))
    start_detached(Path(record.job_directory), 2)
    found = wait_for_end(record)
    assert found.state is JobState.FAILED
    assert found.reason.splitlines() == [
        "2 of 3 nodes are up after 12 s; these did not come:",
        f"  n2: no sign of it; does it see {StartFolder.of(Path(record.job_directory), 1).path}?",
    ]
    assert "waiting for n2" in log(record)


def test_an_elastic_job_goes_on_without_a_node_that_did_not_come(make_request: Callable[..., JobRequest]):
    count = "import ray; ray.init(log_to_driver=False); print('driver sees', len(ray.nodes()), 'nodes')"
    record = start_first_node_only(make_request(count, nodes=3, min_nodes=2))
    start_detached(Path(record.job_directory), 1)
    StartFolder.of(Path(record.job_directory), 1).report(2, NodeReport("n3", "", "", "failed", "it is on fire"))
    assert wait_for_end(record).state is JobState.COMPLETED, log(record)
    assert "2 of 3 nodes are up after" in log(record)
    assert "  n3: it is on fire\nray: going on without them; the profile needs 2\n" in log(record)
    assert "driver sees 2 nodes" in log(record)


def test_a_secret_that_is_lost_on_the_way_is_named(make_request: Callable[..., JobRequest]):
    record = start_first_node_only(make_request(SLEEP, environment={"ZF_TEST_TOKEN": SECRET, "NCCL_DEBUG": "INFO"}))
    found = wait_for_end(record)
    assert found.state is JobState.FAILED
    assert found.reason.startswith("ZF_TEST_TOKEN of the profile's environment did not get here: what starts the job")


def test_a_head_that_dies_while_workers_join_is_started_again(make_request: Callable[..., JobRequest]):
    record = submit(make_request("print('made it')", nodes=2))
    folder = StartFolder.of(Path(record.job_directory), 1)
    first = wait_for(folder.head, "head")
    server = wait_for(lambda: _listener(record, "gcs_server"), "gcs_server")
    os.kill(server, signal.SIGKILL)
    found = wait_for_end(record, timeout=120)
    assert found.state is JobState.COMPLETED, log(record)
    assert "the head did not start; trying other ports" in log(record)
    assert "made it" in log(record)
    assert first[0] not in log(record).rpartition("trying other ports")[2], "it is another port now"


def _listener(record: JobRecord, name: str) -> int | None:
    agent = psutil.Process(int(record.backend_id))
    for child in agent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(name):
                return child.pid
    return None


def test_ports_are_the_jobs_own_and_move_when_something_else_has_them():
    first = port_block("a job/0", "127.0.1.1")
    assert first == port_block("a job/0", "127.0.1.1"), "derived, not drawn"
    assert len(first) == PORTS_PER_NODE
    assert not set(first) & set(port_block("another job/0", "127.0.1.1"))
    with socket.socket() as other:
        other.bind(("127.0.1.1", first[3]))
        other.listen()
        assert not set(first) & set(port_block("a job/0", "127.0.1.1"))


def test_when_no_ports_are_free_it_says_so(monkeypatch: pytest.MonkeyPatch):
    import cluster.ray_node

    with socket.socket() as other:
        other.bind(("127.0.1.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(cluster.ray_node, "PORT_RANGE", range(port, port + PORTS_PER_NODE))
        with pytest.raises(RayStartError, match=f"no {PORTS_PER_NODE} neighbouring ports .* are free"):
            port_block("a job", "127.0.1.1")


def test_a_machine_that_does_not_see_the_run_directory_says_so(tmp_path: Path):
    from cluster.start_folder import JobSpec

    with pytest.raises(
        BackendError, match=r"does not see .*spec.json: the run directory must lie on a file system that"
    ):
        JobSpec.read(tmp_path / "elsewhere")


def test_a_driver_that_does_not_see_the_run_directory_says_so(tmp_path: Path):
    """On a Ray cluster that was there before, the driver is the first to look."""
    command = [sys.executable, "-P", "-m", "launcher.orchestration.driver", str(tmp_path / "elsewhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r".* does not see the run directory .*elsewhere: it must lie on a file system that all nodes share; .*\n",
        done.stderr,
    )


def test_submitting_does_not_wait_for_the_run(make_request: Callable[..., JobRequest], tmp_path: Path):
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.1)"
    record = submit(make_request(wait))
    assert status(record).state is JobState.RUNNING
    (tmp_path / "go").touch()
    assert wait_for_end(record).state is JobState.COMPLETED
