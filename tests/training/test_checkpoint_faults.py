"""Checkpoints that something happened to, and disks that do not take one: real files, real file systems, real ranks."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.files import FileRecord, file_hash
from launcher.checkpoints.manifest import read_manifest, write_manifest
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from tests.support.forked import ForkServer

pytestmark = pytest.mark.distributed

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
OPTIMIZER_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def losses(directory: RunDirectory) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer, base_recipe: Path, prepared: PreparedData
) -> RunDirectory:
    """A complete run of eight steps with a checkpoint every second one."""
    directory = RunDirectory.at(tmp_path_factory.mktemp("whole") / "run")
    recipe = load_recipe(base_recipe, ["max_steps=8", "save_steps=2", "save_total_limit=null"])
    write_run(directory, make_plan(recipe, Resources(workers_per_node=2)))
    fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert [folder.name for folder in folders.complete(directory.checkpoints)] == [
        f"step_{step:08d}" for step in (2, 4, 6, 8)
    ]
    return directory


@pytest.fixture
def interrupted(whole: RunDirectory, tmp_path: Path) -> RunDirectory:
    """That run as it was after step 6."""
    shutil.copytree(whole.path, tmp_path / "run")
    directory = RunDirectory.at(tmp_path / "run")
    shutil.rmtree(directory.checkpoints / "step_00000008")
    return directory


def truncate(folder: Path) -> str:
    os.truncate(folder / OPTIMIZER_FILE, 1000)
    return f"{OPTIMIZER_FILE}: 1,000 bytes instead of"


def flip_a_bit(folder: Path) -> str:
    content = bytearray((folder / OPTIMIZER_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / OPTIMIZER_FILE).write_bytes(content)
    return f"{OPTIMIZER_FILE}: its content has the checksum"


def remove(folder: Path) -> str:
    (folder / OPTIMIZER_FILE).unlink()
    return f"{OPTIMIZER_FILE}: cannot be read: No such file"


def take_from_another_step(folder: Path) -> str:
    shutil.copy(folder.with_name("step_00000002") / OPTIMIZER_FILE, folder / OPTIMIZER_FILE)
    return f"{OPTIMIZER_FILE}: its content has the checksum"


def add_a_stranger(folder: Path) -> str:
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    return "mp_rank_01_model_states.pt: the manifest does not know this file"


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, remove, take_from_another_step, add_a_stranger])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    harm: Callable[[Path], str],
    whole: RunDirectory,
    interrupted: RunDirectory,
    fork_server: ForkServer,
    prepared: PreparedData,
) -> None:
    fault = harm(interrupted.checkpoints / "step_00000006")
    results = fork_server.results(2, "cases:run", run_directory=str(interrupted.path), data=str(prepared.directory))
    (notice,) = results[0]["notices"]
    assert notice.startswith(f"checkpoint step_00000006 is damaged: {fault}")
    assert "set aside as" in notice
    assert results[1]["notices"] == []
    assert losses(interrupted) == losses(whole)
    names = {folder.name for folder in interrupted.checkpoints.iterdir() if folder.is_dir()}
    assert names == {f"step_{step:08d}" for step in (2, 4, 6, 8)} | {"step_00000006.damaged"}


def test_sizes_alone_are_compared_when_the_recipe_says_so(
    interrupted: RunDirectory, fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    make_run("max_steps=8", "save_steps=2", "save_total_limit=null", "checkpoint.verify=size")
    truncate(interrupted.checkpoints / "step_00000006")
    folder = interrupted.checkpoints / "step_00000004"
    manifest = read_manifest(folder)
    wrong = {name: record.model_copy(update={"xxh3_128": "0" * 32}) for name, record in manifest.files.items()}
    write_manifest(folder, manifest.model_copy(update={"files": wrong}))
    results = fork_server.results(2, "cases:run", run_directory=str(interrupted.path), data=str(prepared.directory))
    (notice,) = results[0]["notices"]
    assert "step_00000006 is damaged" in notice


def test_nothing_is_begun_anew_without_a_word(
    interrupted: RunDirectory, fork_server: ForkServer, prepared: PreparedData
) -> None:
    for folder in folders.complete(interrupted.checkpoints):
        truncate(folder)
    outcomes = fork_server.run(2, "cases:run", run_directory=str(interrupted.path), data=str(prepared.directory))
    for outcome in outcomes:
        assert outcome["type"] == "CheckpointError"
        assert "can be trusted; set aside: " in outcome["message"]
        assert "step_00000002.damaged" in outcome["message"]


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def test_a_file_that_would_run_code_is_refused(
    interrupted: RunDirectory, fork_server: ForkServer, prepared: PreparedData, tmp_path: Path
) -> None:
    """Whoever made it also made its checksum fit."""
    folder = interrupted.checkpoints / "step_00000006"
    for name in (OPTIMIZER_FILE, "mp_rank_00_model_states.pt"):
        (folder / name).write_bytes(pickle.dumps({"module": Runs(tmp_path / "it-ran")}, protocol=2))
    manifest = read_manifest(folder)
    files = {
        name: FileRecord(size=(folder / name).stat().st_size, xxh3_128=file_hash(folder / name), rank=record.rank)
        for name, record in manifest.files.items()
    }
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    outcomes = fork_server.run(2, "cases:run", run_directory=str(interrupted.path), data=str(prepared.directory))
    assert outcomes[0]["type"] == "CheckpointError"
    assert "is refused: it is no checkpoint of ours, or would run code" in outcomes[0]["message"]
    assert not (tmp_path / "it-ran").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with options; a real file system of a kind that tests can make."""
    if os.geteuid() != 0:
        pytest.skip("hardware: mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def on_disk(directory: RunDirectory, disk: Path) -> None:
    directory.checkpoints.rmdir()
    directory.checkpoints.symlink_to(disk)


@pytest.mark.parametrize(("asynchronous", "last_step"), [("true", 8), ("false", 6)])
def test_a_full_disk_fails_saves_but_not_the_training_until_too_many(
    asynchronous: str,
    last_step: int,
    fork_server: ForkServer,
    make_run: MakeRun,
    prepared: PreparedData,
    mounted: Callable[[str], Path],
) -> None:
    """How the third save beside the training ended is known when the fourth would begin."""
    disk = mounted("size=2400k")
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * 2_000_000)
    settings = ("max_steps=20", "save_steps=2", "checkpoint.max_failed_saves=2")
    directory, _ = make_run(*settings, f"asynchronous={asynchronous}")
    on_disk(directory, disk)
    outcomes = fork_server.run(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    for outcome in outcomes:
        assert outcome["type"] == "StorageError"
        assert "checkpoint at step 6 cannot be written" in outcome["message"]
        assert "No space left on device" in outcome["message"]
        assert "MiB free there" in outcome["message"]
    assert max(losses(directory)) == last_step
    assert {path.name for path in disk.iterdir()} == {"ballast"}, "what could not be finished is removed"
    ballast.unlink()
    results = fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert (results[0]["step"], results[0]["notices"]) == (20, [])


def test_a_save_that_fails_is_told_and_the_next_one_counts_anew(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData, mounted: Callable[[str], Path]
) -> None:
    """Room for two checkpoints but not for three: with a limit of two the third save meets a full disk, every time."""
    disk = mounted("size=1700k")
    directory, _ = make_run("max_steps=4", "save_steps=1", "save_total_limit=2", "checkpoint.max_failed_saves=1")
    on_disk(directory, disk)
    outcomes = fork_server.run(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert [outcome["type"] for outcome in outcomes] == ["StorageError"] * 2
    assert [folder.name for folder in folders.complete(disk)] == ["step_00000001", "step_00000002"]


def test_a_read_only_folder_is_refused_before_training(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData, mounted: Callable[[str], Path]
) -> None:
    directory, _ = make_run("max_steps=4")
    on_disk(directory, mounted("ro"))
    outcomes = fork_server.run(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    for outcome in outcomes:
        assert outcome["type"] == "StorageError"
        assert "cannot write there: Read-only file system" in outcome["message"]
    assert not directory.metrics.exists()


def test_ranks_that_do_not_share_the_folder_are_refused_before_training(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    if os.geteuid() != 0:
        pytest.skip("hardware: a mount of its own needs root")
    directory, _ = make_run("max_steps=4")
    outcomes = fork_server.run(
        2,
        "cases:run_hidden",
        run_directory=str(directory.path),
        data=str(prepared.directory),
        rank=1,
        folder=str(directory.checkpoints),
    )
    for outcome in outcomes:
        assert outcome["type"] == "StorageError"
        assert "do not share the folder" in outcome["message"]
        assert "does not see what rank 0 wrote there" in outcome["message"]
        assert "--run-dir" in outcome["message"]
    assert not directory.metrics.exists()
    assert list(directory.checkpoints.iterdir()) == []
