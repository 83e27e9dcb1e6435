"""A registry, a home and fake commands of the test's own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.profile import Profile
from cluster.types import JobRecord, JobRequest


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records go, instead of the tester's own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder / "zerofleet" / "jobs"


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a shell script first on PATH under a command's name; returns the file that its arguments are appended to."""
    folder = tmp_path / "fake-bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, script: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        path = folder / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\n{script}\n')
        path.chmod(0o755)
        return calls

    return make


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., JobRequest]:
    """A request; keyword arguments make its profile."""

    def make(
        nodes: int = 2,
        gpus_per_node: int = 0,
        run_directory: Path | None = None,
        argv: tuple[str, ...] = ("true",),
        **profile,
    ) -> JobRequest:
        directory = run_directory or tmp_path / "run"
        settings = {"backend": "slurm", "workers_per_node": 1, "device": "cpu", "name": "test", **profile}
        return JobRequest(
            name="gpt",
            run_directory=directory,
            job_directory=directory / "jobs" / "0001",
            argv=argv,
            profile=Profile(nodes=nodes, **settings),
            nodes=nodes,
            cpus_per_node=2.0,
            gpus_per_node=gpus_per_node,
            save_before_end_seconds=300,
            progress_directory=directory / "checkpoints",
        )

    return make


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., JobRecord]:
    """A record, of a Slurm job if nothing else is said; its job directory exists."""

    def make(**values) -> JobRecord:
        run_directory = Path(values.pop("run_directory", tmp_path / "run"))
        job_directory = Path(values.pop("job_directory", run_directory / "jobs" / "0001"))
        job_directory.mkdir(parents=True, exist_ok=True)
        defaults = {
            "id": "bakemotu",
            "name": "gpt",
            "backend": "slurm",
            "backend_id": "1234",
            "run_directory": str(run_directory),
            "job_directory": str(job_directory),
            "argv": ("python", "-m", "driver"),
            "submitted": 1_800_000_000.0,
            "profile": "lab",
            "nodes": 2,
        }
        return JobRecord(**{**defaults, **values})

    return make
