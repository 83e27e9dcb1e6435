"""Hosts that ssh cannot or does not want to reach, and hosts on which nothing starts: refused with ssh's own words."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.profile import Profile
from cluster.ssh import SshBackend
from cluster.types import JobRecord, JobRequest, JobState
from tests.jobs.conftest import assert_nothing_left
from tests.support.sshd import HOSTS, SshServer

pytestmark = pytest.mark.ssh

BACKEND = SshBackend()


@pytest.fixture
def make_request(tmp_path: Path, ssh_server: SshServer) -> Callable[..., JobRequest]:
    def make(nodes: int = 2, **ssh) -> JobRequest:
        folder = tmp_path / "a run"
        folder.mkdir(exist_ok=True)
        section = {"hosts": list(HOSTS), "options": list(ssh_server.options), **ssh}
        return JobRequest(
            name="test",
            run_directory=folder,
            job_directory=folder / "jobs" / "0001",
            argv=(sys.executable, "-P", "-c", "import time; time.sleep(60)"),
            profile=Profile(name="lab", backend="ssh", nodes=nodes, workers_per_node=1, device="cpu", ssh=section),
            nodes=nodes,
            cpus_per_node=1.0,
            gpus_per_node=0,
            save_before_end_seconds=60,
            progress_directory=folder / "checkpoints",
        )

    return make


def refusal(request: JobRequest) -> str:
    with pytest.raises(BackendError) as caught:
        BACKEND.submit(request)
    assert_nothing_left(request.run_directory)
    return str(caught.value)


def test_a_host_key_that_is_not_known(make_request, ssh_server: SshServer):
    (ssh_server.folder / "empty").touch()
    text = refusal(make_request(options=list(ssh_server.options_with(known_hosts="empty"))))
    assert text.startswith("the job cannot start on 2 of 2 hosts:\n  127.0.1.1: ssh to 127.0.1.1 fails: ")
    assert "Host key verification failed" in text
    assert "connect to it once by hand and compare the key: ssh 127.0.1.2" in text


def test_a_host_key_that_has_changed(make_request, ssh_server: SshServer):
    other = ssh_server.folder / "other_host_key"
    if not other.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = " ".join(other.with_suffix(".pub").read_text().split()[:2])
    (ssh_server.folder / "changed").write_text("".join(f"[{host}]:{ssh_server.port} {key}\n" for host in HOSTS))
    text = refusal(make_request(options=list(ssh_server.options_with(known_hosts="changed"))))
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in text


def test_a_key_that_is_not_let_in(make_request, ssh_server: SshServer):
    stranger = ssh_server.folder / "stranger"
    if not stranger.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    text = refusal(make_request(options=list(ssh_server.options_with(key="stranger"))))
    assert "Permission denied (publickey)" in text
    assert "it must let you in without a question: ssh-copy-id" in text


def test_when_one_host_is_not_there_nothing_is_left_on_the_other(make_request):
    text = refusal(make_request(hosts=[HOSTS[0], "127.0.1.9"]))
    assert text.startswith("the job cannot start on 1 of 2 hosts:\n  127.0.1.9: ssh to 127.0.1.9 fails: ")
    assert "Connection refused" in text


def test_a_host_without_zerofleet(make_request):
    assert "install ZeroFleet there" in refusal(make_request(python="/nowhere/python"))


def test_a_failing_setup_command(make_request):
    assert "no such module: cuda" in refusal(make_request(setup=["echo 'no such module: cuda' >&2; exit 1"]))


def test_a_setup_command_that_ends_the_shell(make_request):
    assert "it answered, but started nothing" in refusal(make_request(setup=["exit 0"]))


def test_the_dry_run_is_what_is_run(make_request):
    request = make_request()
    shown = [shlex.split(line) for line in BACKEND.render(request).splitlines()]
    assert shown[0][0] == "ssh"
    assert [line[-2] for line in shown[:2]] == list(HOSTS)
    assert not request.job_directory.exists()


def test_a_host_that_is_gone_leaves_the_state_unknown(make_request, ssh_server: SshServer, tmp_path: Path):
    process = "00000000-boot/1/1"
    facts = {"hosts": ["127.0.1.9"], "processes": [process], "options": list(ssh_server.options)}
    (tmp_path / "jobs").mkdir()
    record = JobRecord(
        "bakemotu",
        "test",
        "ssh",
        "127.0.1.9:1",
        str(tmp_path),
        str(tmp_path / "jobs"),
        ("true",),
        0.0,
        "lab",
        1,
        facts=facts,
    )
    status = BACKEND.states([record])["bakemotu"]
    assert status.state is JobState.UNKNOWN
    assert "Connection refused" in status.reason
    with pytest.raises(BackendError, match="Connection refused"):
        BACKEND.cancel(record, now=True)
    here = JobRecord(**{**vars(record), "facts": {**facts, "hosts": [HOSTS[0]]}})
    assert BACKEND.states([here])["bakemotu"].native == "gone", "the pid of that boot is nobody's now"
