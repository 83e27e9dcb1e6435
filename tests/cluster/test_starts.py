"""When a job that Slurm wants to stop is requeued, and when that leads nowhere."""

from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, SIGUSR2

import pytest

from cluster.agent import Place
from cluster.draft import count_gpus, draft, partitions
from cluster.errors import BackendError
from cluster.job_files import log_of, status_from_files
from cluster.slurm_task import SlurmFirstNode, own_address
from cluster.start_folder import JobSpec, Outcome, StartFolder, last_start

STOPPED = Outcome("stopped", 130, "SIGUSR2: saved and ended", "SIGUSR2")


@pytest.fixture
def leave(tmp_path: Path, fake_command) -> Callable[..., Outcome]:
    """Have the first node of a start leave; returns what it wrote down."""
    fake_command("scontrol", "echo JobId=1 JobState=RUNNING PreemptTime=None")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    job = tmp_path / "job"
    job.mkdir()

    def run(number: int, outcome: Outcome, *, signals=(SIGUSR2,), checkpoint: str | None = None) -> Outcome:
        folder = StartFolder.of(job, number)
        folder.path.mkdir()
        if checkpoint is not None:
            (checkpoints / checkpoint).mkdir()
        spec = JobSpec("gpt", ("true",), {}, str(tmp_path), 1, 1.0, 0, 5.0, False, str(checkpoints))
        agent = SlurmFirstNode(spec, job, folder, Place(0, ("n1",), "127.0.1.1", "key"))
        agent.signals = list(signals)
        agent.leave(outcome)
        found = folder.outcome()
        assert found is not None
        assert (job / "requeue").exists() == found.requeue
        (job / "requeue").unlink(missing_ok=True)
        return found

    return run


def test_a_warning_of_slurm_requeues_as_often_as_the_run_gets_on(leave):
    for number in range(1, 8):
        found = leave(number, STOPPED, checkpoint=f"step_{number:08d}")
        assert found.requeue
        assert found.message == "SIGUSR2: saved and ended, to be requeued"


def test_starts_that_lead_nowhere_end(leave):
    assert leave(1, STOPPED, checkpoint="step_00000005").requeue
    assert leave(2, STOPPED).requeue
    found = leave(3, STOPPED)
    assert (found.state, found.requeue) == ("failed", False)
    assert found.message.startswith("3 starts in a row ended before a new checkpoint")
    assert "slurm.time_limit" in found.message


def test_a_new_checkpoint_starts_the_count_again(leave):
    assert leave(1, STOPPED).requeue
    assert leave(2, STOPPED).requeue
    assert leave(3, STOPPED, checkpoint="step_00000005").requeue
    assert leave(4, STOPPED).requeue


def test_a_start_of_which_nothing_was_heard_does_not_count(leave, tmp_path):
    StartFolder.of(tmp_path / "job", 1).path.mkdir()
    assert leave(2, STOPPED).requeue
    assert leave(3, STOPPED).requeue
    assert not leave(4, STOPPED).requeue


def test_what_a_person_asked_for_is_not_undone(leave):
    assert not leave(1, STOPPED, signals=(SIGTERM,)).requeue
    assert not leave(2, Outcome("completed", 0)).requeue
    assert not leave(3, Outcome("failed", 1, "no")).requeue


def test_preemption_is_known_without_the_warning(leave, fake_command):
    fake_command("scontrol", "echo JobId=1 JobState=RUNNING PreemptTime=2026-11-22T02:00:00")
    assert leave(1, STOPPED, signals=(SIGTERM,)).requeue


def test_without_scontrol_sigterm_is_a_persons_wish(leave, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not leave(1, STOPPED, signals=(SIGTERM,)).requeue


def test_starts_are_in_order_however_many_there_are(make_record):
    """Those of an array's tasks are counted from 1001, 2001, ..."""
    record = make_record()
    job = Path(record.job_directory)
    for number in (1, 10, 999, 1000, 1001, 2001, 10001):
        StartFolder.of(job, number).path.mkdir()
    (job / "start_of_something").touch()
    names = [folder.path.name for folder in StartFolder.all_of(job)]
    assert names == [f"start_{number:03d}" for number in (1, 10, 999, 1000, 1001, 2001, 10001)]
    last = last_start(job)
    assert last is not None
    assert last.path.name == "start_10001"
    assert status_from_files(record).starts == 7
    assert log_of(record, 0, 6).name.endswith("start_2001/node_0000.log")


def test_addresses_of_nodes(fake_command, monkeypatch):
    monkeypatch.setattr(
        "socket.gethostbyname", _resolver({"gpu1": "10.1.0.1", "gpu2": "127.0.1.1", "10.9.0.3": "10.9.0.3"})
    )
    fake_command("scontrol", 'case "$3" in gpu3) echo "NodeName=gpu3 NodeAddr=10.9.0.3 NodeHostName=x";; esac')
    assert own_address(0, ("gpu1", "gpu2")) == "10.1.0.1"
    assert own_address(0, ("gpu3",)) == "10.9.0.3", "Slurm's address for a name that the resolver does not know"
    assert own_address(0, ("gpu9",)) == "127.0.0.1"
    monkeypatch.setattr("cluster.slurm_task._source_address", {"10.1.0.1": "10.1.0.2"}.get)
    assert own_address(1, ("gpu1", "gpu2")) == "10.1.0.2", "the name means loopback: the way to the others tells"


def _resolver(names: dict[str, str]):
    def resolve(name: str) -> str:
        if name not in names:
            raise OSError(name)
        return names[name]

    return resolve


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("(null)", 0), ("gpu", 1), ("gpu:a100:2,gpu:t4:1,shard:8", 3), ("", 0)],
)
def test_gpus_in_slurms_notation(gres, count):
    assert count_gpus(gres) == count


def test_a_profile_is_drafted_from_sinfo(fake_command, tmp_path):
    from cluster.profile import load_profile

    lines = (
        "*** maintenance on Friday | read the mail ***",
        "old|4|8|(null)|infinite|down",
        "none|0|0|(null)|infinite|up",
        "cpu|20|64|(null)|infinite|up",
        "gpu*|4|96|gpu:a100:8(S:0-1)|2-00:00:00|up",
        "gpu*|2|48+|gpu:a100:4|2-00:00:00|up",
    )
    fake_command("sinfo", "cat <<'END'\n{}\nEND".format("\n".join(lines)))
    assert [partition.name for partition in partitions()] == ["gpu", "cpu"]
    path = tmp_path / "drafted.yaml"
    path.write_text(draft("slurm"))
    profile = load_profile(path)
    assert (profile.backend, profile.nodes, profile.workers_per_node, profile.device) == ("slurm", 2, 4, "cuda")
    assert (profile.cpus_per_worker, profile.slurm.partition, profile.slurm.time_limit) == (12.0, "gpu", "2-00:00:00")
    assert "# also there: cpu (20 nodes, 64 CPUs, 0 GPUs, infinite)" in path.read_text()


@pytest.mark.parametrize("backend", ["local", "ray", "ssh"])
def test_drafts_of_other_backends_load(backend, tmp_path):
    from cluster.profile import load_profile

    path = tmp_path / "drafted.yaml"
    path.write_text(draft(backend))
    assert load_profile(path).backend == backend


def test_the_gpus_of_this_machine_are_drafted_by_what_nvidia_smi_calls_them(fake_command, tmp_path, monkeypatch):
    import cluster.profile
    from launcher.jobs import draft_profile

    devices = tmp_path / "dev"
    devices.mkdir()
    for index in range(8):
        (devices / f"nvidia{index}").touch()
    monkeypatch.setattr(cluster.profile, "DEVICE_FOLDER", devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "drafted.yaml"
    drafted = {}
    for name in ("NVIDIA H100 80GB HBM3", "Somebody's accelerator: 7"):
        fake_command("nvidia-smi", f'for i in 1 2 3 4 5 6 7 8; do echo "{name}"; done')
        path.write_text(draft_profile("local"))
        drafted[name] = cluster.profile.load_profile(path)
        assert name in drafted[name].description
    known, unknown = drafted.values()
    assert (known.workers_per_node, known.device, known.accelerator) == (8, "cuda", "H100-80GB")
    assert (unknown.workers_per_node, unknown.accelerator) == (8, None)
    fake_command("nvidia-smi", "echo 'couldn t communicate with the NVIDIA driver'; exit 9")
    assert "GPUs:" not in draft_profile("local")


def test_drafts_that_cannot_be(fake_command):
    fake_command("sinfo", "echo 'old|4|8|(null)|infinite|down'")
    with pytest.raises(BackendError, match="sinfo shows no partition that is up and has nodes"):
        draft("slurm")
    with pytest.raises(BackendError, match="no backend 'k8s'; there are local, ray, slurm, ssh"):
        draft("k8s")
