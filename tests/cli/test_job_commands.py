"""The commands about jobs: what they print, what they refuse, and how long they take. The backend is the local one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import registry
from cluster.start_folder import Outcome, StartFolder
from cluster.types import JobRecord
from launcher.cli.main import app, main
from launcher.cli.submit import combinations, split_values

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ended_job(tmp_path: Path) -> Callable[..., JobRecord]:
    """A job of which only files are left: it was started, trained and ended."""

    def make(
        job_id: str = "bakemotu",
        *,
        state: str = "completed",
        sweep: str = "",
        point: tuple[str, ...] = (),
        name: str = "tiny",
        **progress,
    ) -> JobRecord:
        run_directory = tmp_path / "runs" / job_id
        job_directory = run_directory / "jobs" / "0001"
        start = StartFolder.of(job_directory, 1)
        start.path.mkdir(parents=True)
        start.node_log(0).write_text("ray: 1 of 1 nodes are up\n")
        start.end(Outcome(state, 0 if state == "completed" else 130, "" if state == "completed" else "saved and ended"))
        now = time.time()
        moments = {
            "started": now - 9,
            "ray_head": now - 4,
            "nodes_joined": now - 4,
            "starting": now - 3,
            "running": now - 2,
        }
        facts = {
            "time": now + 1,
            "step": 20,
            "max_steps": 20,
            "phase": "save",
            "metrics": {"loss": 3.5, "eval_loss": 3.25, **progress},
            "seconds_remaining": 0.0,
            "moments": {**moments, "engine": now - 1.5, "data": now - 1, "first_step": now - 0.9},
        }
        (run_directory / "progress.json").write_text(json.dumps(facts))
        logs = run_directory / "logs"
        logs.mkdir()
        (logs / "rank_00000.log").write_text("=== attempt of 1\nfirst\n=== attempt of 2\nsecond\n")
        record = JobRecord(
            job_id,
            name,
            "local",
            "1",
            str(run_directory),
            str(job_directory),
            ("driver",),
            now - 10,
            "local",
            1,
            sweep,
            point,
            {"host": os.uname().nodename, "process": "boot/1/1"},
        )
        registry.add(record)
        return record

    return make


def invoke(*arguments: str) -> str:
    result = RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["zerofleet", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err.strip()


def test_jobs_lists_the_newest_first(ended_job):
    ended_job("bakemotu")
    ended_job("dusatiro", state="stopped")
    header, newest, oldest = invoke("jobs").splitlines()
    assert header.split() == ["JOB", "NAME", "STATE", "WHERE", "STEP", "LOSS", "AGE", "RUN", "DIRECTORY"]
    assert newest.split()[:6] == ["dusatiro", "tiny", "STOPPED", "local", "20/20", "3.2500"]
    assert oldest.split()[2] == "COMPLETED"
    assert [job["id"] for job in json.loads(invoke("jobs", "--json"))] == ["dusatiro", "bakemotu"]


def test_without_jobs():
    assert invoke("jobs") == "no job was submitted yet: zerofleet submit RECIPE --profile PROFILE\n"
    assert json.loads(invoke("jobs", "--json")) == []


def test_a_sweep_is_compared(ended_job, capsys, monkeypatch):
    shared = ("max_steps=20",)
    ended_job("bakemotu", sweep="ab12cd", point=("learning_rate=1e-4", *shared), eval_loss=3.0)
    ended_job("dusatiro", sweep="ab12cd", point=("learning_rate=3e-4", *shared), eval_loss=2.5)
    ended_job("fasolati")
    rows = [line.split() for line in invoke("jobs", "--sweep", "ab12cd").splitlines()]
    assert [row[5:7] for row in rows] == [
        ["LOSS", "VALUES"],
        ["3.0000", "learning_rate=1e-4"],
        ["2.5000", "learning_rate=3e-4"],
    ]
    point = json.loads(invoke("jobs", "--sweep", "ab12cd", "--json"))[1]["point"]
    assert point == ["learning_rate=3e-4", "max_steps=20"]
    assert refused(capsys, monkeypatch, "jobs", "--sweep", "zz") == "no sweep 'zz'; known are ab12cd"


@pytest.mark.parametrize("word", ["bakemotu", "bak", "runs/bakemotu"])
def test_status_by_any_name(ended_job, word):
    ended_job()
    text = invoke("status", word)
    assert text.startswith("bakemotu  tiny  COMPLETED\n")
    assert "step 20/20 | loss 3.5000 | eval 3.2500" in text
    assert [line.split()[-2] for line in text.splitlines() if line.endswith(" s")] == [
        "1.00",
        "5.00",
        "0.00",
        "1.00",
        "1.00",
        "0.50",
        "0.50",
        "0.10",
        "9.10",
    ]
    found = json.loads(invoke("status", word, "--json"))
    assert (found["state"], found["starts"], found["progress"]["metrics"]["eval_loss"]) == ("COMPLETED", 1, 3.25)
    assert list(found["phases"])[:2] == ["queue", "ray head"]


def test_what_was_written_before_this_job_is_not_its_progress(ended_job, tmp_path):
    record = ended_job()
    path = Path(record.run_directory) / "progress.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "time": record.submitted - 1}))
    assert json.loads(invoke("status", "bakemotu", "--json"))["progress"] == {}


def test_logs_of_node_rank_and_attempt(ended_job, capsys, monkeypatch):
    ended_job()
    assert invoke("logs", "bakemotu") == "ray: 1 of 1 nodes are up\n"
    assert invoke("logs", "bakemotu", "--rank", "0").count("attempt") == 2
    assert invoke("logs", "bakemotu", "--rank", "0", "--attempt", "1") == "=== attempt of 1\nfirst\n"
    assert invoke("logs", "bakemotu", "--rank", "0", "--attempt", "-1").startswith("=== attempt of 2\nsecond\n")
    assert json.loads(invoke("logs", "bakemotu", "--json"))["content"] == "ray: 1 of 1 nodes are up\n"
    assert invoke("logs", "bakemotu", "--follow") == "ray: 1 of 1 nodes are up\n", "it has ended"
    assert invoke("logs", "bakemotu", "--follow", "--rank", "0").endswith("=== attempt of 2\nsecond\n")
    for arguments, told in {
        ("--rank", "3"): "no log of rank 3; there are 0 to 0",
        ("--rank", "3", "--follow"): "no log of rank 3; there are 0 to 0",
        ("--rank", "0", "--attempt", "3"): "there is no attempt 3: the log holds 2",
        ("--attempt", "1"): "--attempt goes with --rank",
        ("--node", "1"): "has nodes 0 to 0, and no node 1",
        ("--start", "2"): "has been started 1 times, and 2 is none of these",
        ("--follow", "--json"): "--follow goes neither with --json nor with --attempt",
    }.items():
        assert told in refused(capsys, monkeypatch, "logs", "bakemotu", *arguments)


def test_attach_ends_with_the_job(ended_job):
    ended_job("bakemotu")
    ended_job("dusatiro", state="stopped")
    assert invoke("attach", "bakemotu") == "COMPLETED | step 20/20 | loss 3.5000 | eval 3.2500 | ETA 00:00 | save\n"
    stopped = RUNNER.invoke(app, ["attach", "dusatiro", "--json"])
    assert stopped.exit_code == 130
    assert json.loads(stopped.stdout)["reason"] == "saved and ended"


def test_what_is_refused(ended_job, capsys, monkeypatch, tmp_path):
    ended_job("bakemotu")
    ended_job("bakolina")
    assert refused(capsys, monkeypatch, "cancel", "bakem") == "job bakemotu has ended already: COMPLETED"
    assert refused(capsys, monkeypatch, "status", "bak").startswith("bak is the beginning of 2 job ids: ")
    assert refused(capsys, monkeypatch, "status", "nosuch").startswith("no job 'nosuch': neither an id")
    (tmp_path / "empty").mkdir()
    assert refused(capsys, monkeypatch, "status", "empty").endswith("/empty has no job: nothing was submitted for it")


def test_run_refuses_backends_that_have_no_foreground(capsys, monkeypatch, tmp_path):
    (tmp_path / "lab.yaml").write_text("backend: slurm\nnodes: 2\nworkers_per_node: 1\ndevice: cpu\n")
    assert "use zerofleet submit RECIPE --profile lab --follow" in refused(
        capsys, monkeypatch, "run", "quickstart", "--profile", "lab.yaml"
    )
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_and_writes_nothing(tmp_path):
    (tmp_path / "lab.yaml").write_text(
        "backend: slurm\nnodes: 2\nworkers_per_node: 1\ndevice: cpu\nruns_directory: /shared/runs\n"
    )
    shown = invoke("submit", "quickstart", "--profile", "lab.yaml", "--dry-run")
    assert shown.startswith("#!/bin/bash\n")
    assert "#SBATCH --chdir=/shared/runs/quickstart\n" in shown
    assert "#SBATCH --signal=USR2@300\n" in shown
    assert "signal=USR2@900" in invoke(
        "submit", "quickstart", "save_before_end_seconds=900", "--profile", "lab.yaml", "--dry-run"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"lab.yaml"}


def test_a_sweep_is_planned_whole_before_anything_is_sent(capsys, monkeypatch, tmp_path):
    shown = invoke("sweep", "quickstart", "learning_rate=1e-4,3e-4", "seed=1,2", "max_steps=5", "--dry-run")
    assert shown.count("cluster.provision") == 4
    assert "/000: learning_rate=1e-4 seed=1 max_steps=5\n" in shown
    assert "/003: learning_rate=3e-4 seed=2 max_steps=5\n" in shown
    told = refused(capsys, monkeypatch, "sweep", "quickstart", "learning_rate=1e-4,-1")
    assert "learning_rate" in told
    assert not (tmp_path / "state").exists()
    assert "the grid has 400 points" in refused(
        capsys, monkeypatch, "sweep", "quickstart", f"seed={','.join(map(str, range(400)))}"
    )


def test_points_of_a_grid():
    assert combinations(["a=1,2", "b=x", "c=[1,2],[3]"]) == [
        ["a=1", "b=x", "c=[1,2]"],
        ["a=1", "b=x", "c=[3]"],
        ["a=2", "b=x", "c=[1,2]"],
        ["a=2", "b=x", "c=[3]"],
    ]
    assert split_values("{a: 1, b: 2},'x,y',\"p,q\",plain") == ["{a: 1, b: 2}", "'x,y'", '"p,q"', "plain"]


def test_a_profile_with_readable_secrets_is_warned_of(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text("backend: slurm\nworkers_per_node: 1\ndevice: cpu\nenvironment: {HF_TOKEN: abcdefgh}\n")
    path.chmod(0o644)
    result = RUNNER.invoke(app, ["submit", "quickstart", "--profile", "lab.yaml", "--dry-run"], catch_exceptions=False)
    assert "lab.yaml holds HF_TOKEN and can be read by others; chmod 600 it" in result.stderr
    assert "abcdefgh" not in result.stdout


def test_profile_ls_and_show(tmp_path):
    assert [line.split()[:2] for line in invoke("profile", "ls").splitlines()][:2] == [
        ["local", "local"],
        ["ray", "ray"],
    ]
    assert invoke("profile", "show", "slurm").startswith("# zerofleet submit RECIPE --profile slurm\n")


def test_profile_init_never_overwrites(tmp_path, capsys, monkeypatch):
    assert "backend: local\n" in invoke("profile", "init", "local")
    (tmp_path / "there.yaml").write_text("mine")
    assert (
        refused(capsys, monkeypatch, "profile", "init", "local", "-o", "there.yaml")
        == "there.yaml exists; name another file"
    )
    assert (tmp_path / "there.yaml").read_text() == "mine"


@pytest.mark.parametrize("command", [("jobs",), ("status", "job00500"), ("logs", "job00500")])
def test_with_a_thousand_records_a_look_asks_the_scheduler_at_most_once(ended_job, tmp_path, command):
    """What a look costs beside that, `benchmarks/command_time.py` measures."""
    record = ended_job("job00500")
    folder = registry.registry_folder()
    for index in range(1000):
        facts: dict[str, Any] = {
            **vars(record),
            "id": f"job{index:05d}",
            "submitted": float(index),
            "backend": "slurm",
            "backend_id": f"{index}",
        }
        (folder / f"job{index:05d}.json").write_text(json.dumps(facts))
    asked = tmp_path / "asked"
    for name in ("squeue", "sacct", "scontrol"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/sh\necho {name} >> '{asked}'\n")
        fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launcher.cli.main", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    times = asked.read_text().splitlines() if asked.exists() else []
    assert len(times) == len(set(times)), times
    assert times or command[0] == "logs"
