"""Hostfiles as DeepSpeed writes them, and what ssh says of hosts, with the ssh command faked."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.ssh import SshBackend, read_hostfile
from cluster.start_folder import StartFolder

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


RECORDING = """
file="{folder}/$$"
for word in "$@"; do printf '%s\\0' "$word" >> "$file.call"; done
cat > "$file.told"
case "$*" in *{absent}*) echo "ssh: connect to host {absent} port 22: Connection refused" >&2; exit 255;; esac
echo some-boot/1/1
"""


@pytest.fixture
def calls(fake_command, tmp_path: Path) -> Callable[..., dict[tuple[str, ...], str]]:
    """Have ssh write down what it is given, and reach no host of this name; calling it gives arguments and input."""
    folder = tmp_path / "calls"
    folder.mkdir()

    def read(absent: str = "") -> dict[tuple[str, ...], str]:
        if absent:
            fake_command("ssh", RECORDING.format(folder=folder, absent=absent))
        return {
            tuple(path.read_text().split("\0")[:-1]): path.with_suffix(".told").read_text()
            for path in folder.glob("*.call")
        }

    return read


def test_what_is_run_is_the_dry_run_and_a_secret_goes_to_the_first_host_alone(make_request, calls, tmp_path: Path):
    calls(absent="nowhere")
    environment = {"HF_TOKEN": "hunter2", "NCCL_DEBUG": "INFO"}
    request = make_request(
        nodes=2,
        backend="ssh",
        run_directory=tmp_path / "it's a run",
        ssh={**SECTION, "setup": ["module load cuda"]},
        environment=environment,
    )
    shown = [shlex.split(line) for line in SshBackend().render(request).splitlines()[:2]]
    submission = SshBackend().submit(request)
    assert submission.facts["hosts"] == ["gpu1", "me@gpu2"]
    made = calls()
    assert sorted(["ssh", *call] for call in made) == sorted(shown)
    told = {call[-2]: text for call, text in made.items()}
    assert told == {"gpu1": '{"HF_TOKEN": "hunter2"}\n', "me@gpu2": ""}
    remote = {call[-2]: call[-1] for call in made}
    assert remote["gpu1"].startswith("{ module load cuda; } < /dev/null && ")
    assert remote["gpu1"].endswith(" --node 0 --detach --secrets")
    assert remote["me@gpu2"].endswith(" --node 1 --detach")
    written = [path.read_text() for path in request.run_directory.rglob("*") if path.is_file()]
    assert written
    assert not [text for text in written if "hunter2" in text]


def test_an_elastic_job_does_without_a_host_that_is_not_there(make_request, calls, tmp_path: Path):
    calls(absent="gpu3")
    section = {"hosts": ["gpu1", "gpu2", "gpu3"]}
    request = make_request(nodes=3, min_nodes=2, backend="ssh", run_directory=tmp_path / "run", ssh=section)
    assert SshBackend().submit(request).facts["hosts"] == ["gpu1", "gpu2"]
    report = StartFolder.of(request.job_directory, 1).node(2)
    assert report is not None
    assert (report.name, report.state) == ("gpu3", "failed")
    assert "Connection refused" in report.message
    for nodes, hosts in ((3, ["gpu3", "gpu1", "gpu2"]), (2, ["gpu1", "gpu3"])):
        request = make_request(
            nodes=nodes, min_nodes=2, backend="ssh", run_directory=tmp_path / f"refused-{nodes}", ssh={"hosts": hosts}
        )
        with pytest.raises(
            BackendError, match=f"the job cannot start on 1 of {nodes} hosts:\n  gpu3: ssh to gpu3 fails"
        ):
            SshBackend().submit(request)


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
