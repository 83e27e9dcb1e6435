"""Checkpoints in a second place: an S3 server, fsspec's object store in memory, and a path."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from xxhash import xxh3_128_hexdigest

from launcher.checkpoints import folders, retention
from launcher.checkpoints.manifest import faults_of
from launcher.checkpoints.remote import RemoteCheckpoints, fetch_newest
from launcher.errors import CheckpointError, StorageError
from launcher.orchestration.mirror import Mirror
from launcher.recipe.run_sections import CheckpointSection
from tests.support.s3 import BUCKET, s3_server

MakeCheckpoint = Callable[..., Path]
KEEP_ALL = CheckpointSection(save_total_limit=None)


@pytest.fixture(scope="module")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as environment:
        yield environment


@pytest.fixture(params=["s3", "memory", "file"])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteCheckpoints]:
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(name, value)
        remote = RemoteCheckpoints(f"s3://{BUCKET}/{tmp_path.name}")
        yield remote
        remote.files.clear_instance_cache()  # it keeps the server's address
        return
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield RemoteCheckpoints("memory://bucket/run")
        return
    yield RemoteCheckpoints(str(tmp_path / "elsewhere"))


def test_another_machine_resumes_from_it_alone(
    remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    first, second = make_checkpoint(10), make_checkpoint(20)
    assert remote.steps() == []
    assert remote.upload(first)
    assert remote.upload(second)
    assert not remote.upload(second), "it is there already"
    assert remote.steps() == [10, 20]
    shutil.rmtree(first.parent)
    told: list[str] = []
    folder = fetch_newest(remote, tmp_path / "new" / "checkpoints", told.append)
    assert folder == tmp_path / "new" / "checkpoints" / "step_00000020"
    assert faults_of(folder, contents=True) == []
    assert told == [f"fetched step_00000020 from {remote.url}"]
    assert fetch_newest(remote, tmp_path / "new" / "checkpoints", told.append) is None, "it has the newest"


def test_what_has_no_manifest_there_is_not_there(remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint) -> None:
    """A machine that is lost in the middle of an upload leaves files, and the marker comes last."""
    folder = make_checkpoint(10)
    remote.files.makedirs(f"{remote.root}/{folder.name}", exist_ok=True)
    remote.files.put_file(str(folder / "model.pt"), f"{remote.root}/{folder.name}/model.pt")
    assert remote.steps() == []
    assert remote.upload(folder)
    assert remote.steps() == [10]


def test_a_damaged_one_there_is_told_and_the_one_before_it_is_fetched(
    remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for step in (10, 20):
        remote.upload(make_checkpoint(step))
    remote.files.pipe_file(f"{remote.root}/step_00000020/optim_1.pt", b"\0" * 20_000)
    told: list[str] = []
    folder = fetch_newest(remote, tmp_path / "new", told.append)
    assert folder is not None
    assert folders.step_of(folder) == 10
    assert "step_00000020 from" in told[0]
    assert "is damaged: optim_1.pt: its content has the checksum" in told[0]
    assert {path.name for path in folders.complete(tmp_path / "new")} == {"step_00000010"}


def test_the_same_step_saved_again_replaces_the_old_one(
    remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    remote.upload(make_checkpoint(10, size=100))
    assert remote.upload(make_checkpoint(10, size=200))
    assert remote.manifest(10).size == 500
    assert faults_of(remote.download(10, tmp_path / "new"), contents=True) == []


def test_pruning_follows_the_recipe_there_too(remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint) -> None:
    made = [make_checkpoint(step, eval_loss=loss) for step, loss in [(10, 1.0), (20, 3.0), (30, 2.0), (40, 9.0)]]
    for folder in made:
        remote.upload(folder)
    retention.pin(made[1])
    section = CheckpointSection(save_total_limit=1, keep_best=1)
    assert remote.prune(section, made[0].parent) == [30]
    assert remote.steps() == [10, 20, 40]
    assert not remote.files.exists(f"{remote.root}/step_00000030")


def test_a_mirror_leaves_when_everything_is_there(remote: RemoteCheckpoints, make_checkpoint: MakeCheckpoint) -> None:
    told: list[str] = []
    first = make_checkpoint(10)
    with Mirror(remote, first.parent, CheckpointSection(save_total_limit=1), told.append):
        make_checkpoint(20)
        shutil.rmtree(first)
    assert remote.steps() == [20]
    assert told == []


class Unwilling(RemoteCheckpoints):
    """Refuses what comes, as a store without room or rights does."""

    def upload(self, folder: Path) -> bool:
        raise StorageError(f"checkpoint.directory cannot take {folder.name}: no room")


def test_a_store_that_refuses_is_told_once_and_ends_nothing(make_checkpoint: MakeCheckpoint) -> None:
    folder, told = make_checkpoint(10), []
    mirror = Mirror(Unwilling("memory://bucket/full"), folder.parent, KEEP_ALL, told.append)
    assert not mirror.copy()
    assert not mirror.copy()
    (text,) = told
    assert text.endswith("no room; the checkpoints of the run directory are whole, and this is tried again")


def test_a_manifest_there_that_names_a_file_outside_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    remote = RemoteCheckpoints("memory://bucket/evil")
    folder = make_checkpoint(10)
    remote.upload(folder)
    _, _, body = (folder / "manifest.json").read_bytes().partition(b"\n")
    fields = json.loads(b"{" + body)
    fields["files"]["../../outside"] = fields["files"].pop("model.pt")
    body = json.dumps(fields)[1:].encode()
    content = f'{{"manifest_xxh3_128": "{xxh3_128_hexdigest(body)}",\n'.encode() + body
    remote.files.pipe_file(f"{remote.root}/{folder.name}/manifest.json", content)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        remote.download(10, tmp_path / "new" / "checkpoints")
    assert not list(tmp_path.glob("**/outside"))


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "abfs://container/run"])
def test_a_url_that_nothing_here_can_open_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match=r"checkpoint\.directory .* cannot be used"):
        RemoteCheckpoints(url)
