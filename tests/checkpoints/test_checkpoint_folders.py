"""The checkpoints folder: what a commit leaves, what a crash leaves, and who may read what."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.disk import HashedFile
from launcher.checkpoints.faults import SWITCH
from launcher.checkpoints.files import file_hash, path_inside
from launcher.checkpoints.manifest import MANIFEST_NAME, RankManifest, VersionError, faults_of, read_manifest
from launcher.errors import CheckpointError
from tests.checkpoints.conftest import MakeCheckpoint, manifest_of


def test_a_committed_checkpoint_is_found_and_verifies(make_checkpoint: MakeCheckpoint) -> None:
    second, first = make_checkpoint(20), make_checkpoint(10)
    assert folders.complete(first.parent) == [first, second]
    assert {path.name for path in first.iterdir()} == {"model.pt", "optim_0.pt", "optim_1.pt", MANIFEST_NAME}
    assert faults_of(first, contents=True) == []
    manifest = read_manifest(first)
    assert (manifest.step, manifest.size) == (10, 50_000)
    assert {name: record.rank for name, record in manifest.files.items()} == {
        "model.pt": 0,
        "optim_0.pt": 0,
        "optim_1.pt": 1,
    }


def test_steps_are_sorted_as_numbers(make_checkpoint: MakeCheckpoint) -> None:
    large, small = make_checkpoint(123_456_789), make_checkpoint(99_999_999)
    assert folders.complete(small.parent) == [small, large]


def test_every_rank_verifies_its_own_files(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    (folder / "optim_1.pt").write_bytes(b"")
    assert faults_of(folder, contents=True, share=(0, 2)) == []
    assert faults_of(folder, contents=True, share=(1, 2)) == ["optim_1.pt: 0 bytes instead of 20,000"]
    assert faults_of(folder, contents=True, share=(1, 3)) == ["optim_1.pt: 0 bytes instead of 20,000"]


def test_one_flipped_bit_is_found_by_checksums_and_not_by_sizes(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    content = bytearray((folder / "model.pt").read_bytes())
    content[1234] ^= 4
    (folder / "model.pt").write_bytes(content)
    assert faults_of(folder, contents=False) == []
    (fault,) = faults_of(folder, contents=True)
    assert fault.startswith("model.pt: its content has the checksum ")


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / "optim_0.pt").unlink(), "optim_0.pt: cannot be read: No such file or directory"),
        (lambda folder: os.truncate(folder / "optim_0.pt", 19_999), "optim_0.pt: 19,999 bytes instead of 20,000"),
        (
            lambda folder: (folder / "stranger.pt").write_bytes(b"?"),
            "stranger.pt: the manifest does not know this file",
        ),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{}"), f"{MANIFEST_NAME} is damaged: it does not have its"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), f"{MANIFEST_NAME} cannot be read: No such file"),
    ],
)
def test_each_damage_is_named(make_checkpoint: MakeCheckpoint, harm: object, fault: str) -> None:
    folder = make_checkpoint(1)
    harm(folder)  # type: ignore[operator]  # a parameter
    (found,) = faults_of(folder, contents=True)
    assert found.startswith(fault)


def test_two_shards_swapped_with_each_other(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    (folder / "optim_0.pt").rename(folder / "other")
    (folder / "optim_1.pt").rename(folder / "optim_0.pt")
    (folder / "other").rename(folder / "optim_1.pt")
    assert faults_of(folder, contents=False) == []
    assert [fault.partition(":")[0] for fault in faults_of(folder, contents=True)] == ["optim_0.pt", "optim_1.pt"]


def test_a_manifest_of_a_newer_version_is_no_damage(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(VersionError, match="version 3, and this ZeroFleet reads version 2: a newer ZeroFleet wrote it"):
        faults_of(folder, contents=True)


@pytest.mark.parametrize("name", ["../other/model.pt", "/etc/passwd", "a/../../b", "", "."])
def test_a_name_that_leaves_the_folder_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        path_inside(make_checkpoint(1), name)


def test_a_link_that_leaves_the_folder_is_a_damage(make_checkpoint: MakeCheckpoint) -> None:
    folder, other = make_checkpoint(1), make_checkpoint(2)
    shutil.copy(folder / "model.pt", other / "elsewhere.pt")
    (folder / "model.pt").unlink()
    (folder / "model.pt").symlink_to(other / "elsewhere.pt")
    (fault,) = faults_of(folder, contents=True)
    assert "model.pt is a link that leads out of the folder" in fault


def test_a_manifest_that_names_a_file_outside_is_a_damage(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    record = read_manifest(folder).files["model.pt"]
    incomplete = folder.with_name("step_00000002.incomplete")
    incomplete.mkdir()
    part = RankManifest(rank=0, token="t", files={"../step_00000001/model.pt": record})
    with pytest.raises(CheckpointError, match="recorded and present files differ"):
        folders.commit(incomplete, manifest_of(2), {0: part})
    assert folders.complete(folder.parent) == [folder]


def test_the_pointer_follows_and_is_mended(make_checkpoint: MakeCheckpoint) -> None:
    first = make_checkpoint(1)
    folders.point_to(first)
    second = make_checkpoint(2)
    assert (first.parent / "latest").read_text() == first.name
    folders.tidy(first.parent)
    assert (first.parent / "latest").read_text() == second.name


def test_tidy_removes_what_was_interrupted_and_says_so(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    shutil.copytree(folder, folder.with_name("step_00000002.incomplete"))
    shutil.copytree(folder, folder.with_name("step_00000000.deleting"))
    (folder.parent / ".latest.1.tmp").write_text("half")
    assert folders.tidy(folder.parent) == ["removed step_00000002.incomplete, left by an interrupted save"]
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "latest"}


def test_tidy_takes_back_what_was_being_replaced(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    folder.rename(folder.with_name(folder.name + folders.REPLACED))
    (note,) = folders.tidy(folder.parent)
    assert note.startswith("took step_00000001 back")
    assert faults_of(folder, contents=True) == []


def test_tidy_sets_aside_a_folder_without_a_manifest(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(1)
    (folder / MANIFEST_NAME).unlink()
    (note,) = folders.tidy(folder.parent)
    assert "it is no checkpoint; set aside as step_00000001.damaged" in note
    assert (folder.parent / "step_00000001.damaged" / "model.pt").is_file()


def test_setting_aside_deletes_nothing(make_checkpoint: MakeCheckpoint) -> None:
    first = folders.set_aside(make_checkpoint(1))
    second = folders.set_aside(make_checkpoint(1))
    assert (first.name, second.name) == ("step_00000001.damaged", "step_00000001.damaged-2")
    assert (first / "model.pt").is_file()
    assert folders.complete(first.parent) == []
    assert folders.tidy(first.parent) == []


def test_a_part_of_another_save_is_not_taken(tmp_path: Path) -> None:
    folders.write_rank_manifest(tmp_path, RankManifest(rank=3, token="before", files={}))
    assert folders.read_rank_manifest(tmp_path, 3, "now") is None
    assert folders.read_rank_manifest(tmp_path, 4, "before") is None
    assert folders.read_rank_manifest(tmp_path, 3, "before") is not None


def test_a_checkpoint_of_the_same_step_is_replaced(make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(1, size=100)
    folder = make_checkpoint(1, size=200)
    assert read_manifest(folder).size == 500
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_large_writes_are_hashed_whole(tmp_path: Path) -> None:
    content = os.urandom(9 * 2**20 + 17)
    file = HashedFile(tmp_path / "large")
    with file:
        assert file.write(memoryview(content)) == len(content)
    assert (tmp_path / "large").read_bytes() == content
    assert (file.size, file.xxh3_128) == (len(content), file_hash(tmp_path / "large"))


def delete_until_killed(folder: Path, switch: str) -> None:
    os.environ[SWITCH] = switch
    folders.delete(folder, "prune")


def replace_until_killed(make: MakeCheckpoint, switch: str) -> None:
    os.environ[SWITCH] = switch
    make(1, size=200)


@pytest.mark.parametrize("point", ["prune.begins", "prune.renamed", "prune.file", "prune.done"])
def test_a_killed_deletion_leaves_a_whole_checkpoint_or_none(make_checkpoint: MakeCheckpoint, point: str) -> None:
    folder = make_checkpoint(1)
    run_and_be_killed(delete_until_killed, folder, point)
    assert folders.complete(folder.parent) == ([folder] if point == "prune.begins" else [])
    for left in folders.complete(folder.parent):
        assert faults_of(left, contents=True) == []
    folders.tidy(folder.parent)
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} <= {folder.name}


@pytest.mark.parametrize(
    ("point", "size"),
    [
        ("manifest.written", 250),
        ("manifest.replaced", 250),
        ("commit.replacing", 250),
        ("commit.renamed", 500),
        ("commit.synced", 500),
        ("replace.renamed", 500),
    ],
)
def test_a_killed_replacement_leaves_the_old_or_the_new(make_checkpoint: MakeCheckpoint, point: str, size: int) -> None:
    folder = make_checkpoint(1, size=100)
    run_and_be_killed(replace_until_killed, make_checkpoint, point)
    folders.tidy(folder.parent)
    assert folders.complete(folder.parent) == [folder]
    assert faults_of(folder, contents=True) == []
    assert read_manifest(folder).size == size
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "latest"}


def run_and_be_killed(action: object, argument: object, point: str) -> None:
    switch = json.dumps({"rank": 0, "point": point, "visit": 1})
    process = multiprocessing.get_context("fork").Process(target=action, args=(argument, switch))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


def delete_all(checkpoints: Path, barrier: object, deleted: object) -> None:
    present = folders.complete(checkpoints)
    barrier.wait()  # type: ignore[attr-defined]  # a process's argument
    for folder in present:
        deleted.put((folder.name, folders.delete(folder, "prune")))  # type: ignore[attr-defined]  # as above


def test_two_pruners_at_once(make_checkpoint: MakeCheckpoint) -> None:
    checkpoints = next(iter([make_checkpoint(step) for step in range(1, 21)])).parent
    context = multiprocessing.get_context("fork")
    barrier, deleted = context.Barrier(2), context.Queue()
    processes = [context.Process(target=delete_all, args=(checkpoints, barrier, deleted)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    outcomes = [deleted.get(timeout=5) for _ in range(deleted.qsize())]
    assert sorted(name for name, by_this_one in outcomes if by_this_one) == [
        folders.folder_name(step) for step in range(1, 21)
    ]
    assert list(checkpoints.iterdir()) == []
