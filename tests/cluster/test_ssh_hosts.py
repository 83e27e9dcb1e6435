"""Hostfiles as DeepSpeed writes them, and what ssh says of hosts, with the ssh command faked."""

import shlex
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.ssh import SshBackend, read_hostfile

SECTION = {"hosts": ["gpu1", "me@gpu2"]}


def test_a_hostfile_of_deepspeed(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text("# our nodes\nworker-1 slots=4\n\nworker-2 slots=8  # the new one\nworker-3\n")
    assert read_hostfile(path) == ("worker-1", "worker-2", "worker-3")


def test_everything_that_is_wrong_with_a_hostfile(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text("a slots=2\n-oProxyCommand=evil slots=1\na slots=2\nb slots 4\nc gpus=2\n")
    with pytest.raises(BackendError) as caught:
        read_hostfile(path)
    assert str(caught.value).splitlines() == [
        f"hostfile {path}:",
        "  line 2  '-oProxyCommand=evil slots=1' is not of the form HOST slots=N",
        "  line 3  a is named twice",
        "  line 4  'b slots 4' is not of the form HOST slots=N",
        "  line 5  'c gpus=2' is not of the form HOST slots=N",
    ]
    with pytest.raises(BackendError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "none")


def test_a_hostfile_with_too_few_hosts(make_request, tmp_path: Path):
    (tmp_path / "hostfile").write_text("a slots=2\n")
    request = make_request(nodes=2, backend="ssh", ssh={"hostfile": str(tmp_path / "hostfile")})
    with pytest.raises(BackendError, match=r"nodes is 2, but .*hostfile names 1 hosts"):
        SshBackend().submit(request)


def test_each_host_gets_its_agent_with_options_setup_and_quoting(make_request, tmp_path: Path):
    section = {**SECTION, "options": ["-p", "2222"], "python": "/opt/zf/bin/python", "setup": ["module load cuda"]}
    request = make_request(nodes=2, backend="ssh", run_directory=tmp_path / "it's a run", ssh=section)
    first, second, comment, driver, *rest = SshBackend().render(request).splitlines()
    assert (comment, driver, rest) == ("# of which the first runs", "true", [])
    for line, host, index in ((first, "gpu1", "0"), (second, "me@gpu2", "1")):
        words = shlex.split(line)
        assert words[0] == "ssh"
        assert words[-4:-1] == ["2222", "--", host]
        setup, start = words[-1].split(" && ")
        assert setup == "module load cuda"
        expected = ["/opt/zf/bin/python", "-P", "-m", "cluster.provision", str(request.job_directory)]
        assert shlex.split(start) == [*expected, "--node", index, "--detach"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("Host key verification failed.", "connect to it once by hand and compare the key: ssh gpu1"),
        ("me@gpu1: Permission denied (publickey).", "ssh-copy-id gpu1"),
        ("ssh: Could not resolve hostname gpu1: Name or service not known", "see Host gpu1 in ~/.ssh/config"),
        ("ssh: connect to host gpu1 port 22: Connection refused", "nothing listens there"),
        ("ssh: connect to host gpu1 port 22: Connection timed out", "it does not answer"),
        ("something that nobody has seen yet", "something that nobody has seen yet"),
    ],
)
def test_ssh_is_quoted_and_explained(make_request, fake_command, words, hint):
    fake_command("ssh", f"echo '{words}' >&2; exit 255")
    request = make_request(nodes=1, backend="ssh", ssh=SECTION)
    with pytest.raises(BackendError) as caught:
        SshBackend().submit(request)
    assert words in str(caught.value)
    assert hint in str(caught.value)


def test_without_ssh(make_request, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="ssh is not installed here"):
        SshBackend().submit(make_request(nodes=1, backend="ssh", ssh=SECTION))
