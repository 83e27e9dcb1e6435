"""What ran is written down, and no secret with it."""

import json
import subprocess
from pathlib import Path

import pytest

from cluster.profile import Profile
from launcher.provenance import REDACTED, git_state, record_provenance, without_secrets

SECRETS = {
    "WANDB_API_KEY": "wandb-0123456789",
    "HF_TOKEN": 'tok"en\\with\nodd',
    "DB_PASSWORD": "hunter2hunter2",
    "MY_SECRET": "s3cr3t!",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for command in (
        ("init", "-q"),
        ("config", "user.email", "me@example.org"),
        ("config", "user.name", "me"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "train.py").write_text("steps = 1\n")
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-qm", "first"], cwd=folder, check=True)
    return folder


def test_the_revision_and_what_is_not_committed(repository: Path):
    clean = git_state(repository)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert (clean["diff"], clean["untracked"]) == ("", [])
    (repository / "train.py").write_text("steps = 2\n")
    (repository / "new.py").touch()
    dirty = git_state(repository)
    assert dirty is not None
    assert "-steps = 1\n+steps = 2\n" in dirty["diff"]
    assert dirty["untracked"] == ["new.py"]
    assert not dirty["diff_is_cut"]


def test_outside_of_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_no_secret_is_written_wherever_it_stands(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("OTHER_TOKEN", "from-the-shell")
    lines = [f"{name} = {value!r}" for name, value in {**SECRETS, "OTHER_TOKEN": "from-the-shell"}.items()]
    (repository / "train.py").write_text("\n".join(lines))
    profile = Profile(name="lab", environment={**SECRETS, "NCCL_DEBUG": "INFO"})
    record_provenance(tmp_path / "provenance.json", profile)
    text = (tmp_path / "provenance.json").read_text()
    found = json.loads(text)
    assert found["profile"]["environment"] == {**dict.fromkeys(SECRETS, REDACTED), "NCCL_DEBUG": "INFO"}
    for value in ("wandb-0123456789", "hunter2hunter2", "s3cr3t!", "from-the-shell"):
        assert value not in text
    assert REDACTED in found["working_directory"]["diff"]
    assert found["versions"]["ray"]
    assert any(package.startswith("pydantic==") for package in found["packages"])
    assert found["source"] is None or len(found["source"]["revision"]) == 40


def test_a_secret_in_a_setup_command_is_not_written(tmp_path: Path):
    setup = ["module load cuda", "export WANDB_API_KEY='two words' NCCL_DEBUG=INFO HF_TOKEN=hf_012345"]
    for backend, section in (("slurm", {"setup": setup}), ("ssh", {"setup": setup, "hosts": ["a"]})):
        profile = Profile(backend=backend, workers_per_node=1, device="cpu", **{backend: section})
        record_provenance(tmp_path / "provenance.json", profile)
        found = json.loads((tmp_path / "provenance.json").read_text())["profile"][backend]["setup"]
        told = f"export WANDB_API_KEY={REDACTED} NCCL_DEBUG=INFO HF_TOKEN={REDACTED}"
        assert found == ["module load cuda", told]


def test_short_values_do_not_tear_up_the_text():
    assert without_secrets("a key is on", {"KEY": "on", "SOME_TOKEN": ""}) == "a key is on"
