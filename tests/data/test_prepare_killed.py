"""Preparation in real processes: killed at any moment, twice at once, and on a full disk."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.data.cache import ABANDONED_AFTER_S, building, only_one
from launcher.data.prepare import fingerprint, prepare
from launcher.data.sources import locate_sources
from launcher.data.store import is_complete
from launcher.errors import StorageError
from launcher.recipe.schema import Recipe
from tests.support.unmeasured import unmeasured_environment

MakeRecipe = Callable[..., Recipe]
SCRIPT = """
import resource, sys
from launcher.data.prepare import prepare
from launcher.errors import StorageError
from launcher.recipe.schema import Recipe
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    print(prepare(Recipe.model_validate_json(sys.argv[1])).directory)
except StorageError as error:
    print(type(error).__name__, error)
"""


def start(recipe: Recipe, *limit: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, recipe.model_dump_json(), *map(str, limit)]
    # With a limit coverage could not write its file either, and would say so.
    environment = unmeasured_environment() if limit else dict(os.environ)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip(), errors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def appeared(cache: Path, pattern: str) -> bool:
    """Whether a half-prepared folder holds such a file; a folder may go while it is looked through."""
    try:
        return any(cache.glob(f".*.partial/{pattern}"))
    except FileNotFoundError:
        return False


def in_a_moment(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def test_killed_at_every_stage_nothing_is_taken_for_whole_and_the_result_is_the_same(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.3, "packing": "first_fit_decreasing"}
    undisturbed = prepare(make_recipe(**options, cache_directory=str(tmp_path / "undisturbed")), progress=False)
    recipe, cache = make_recipe(**options), tmp_path / "cache"
    stages = ["scratch/*/text/**/*.arrow", "tokenizer/tokenizer.json", "train/*/tokens.npy", "*.npy"]
    for stage in stages:
        process = start(recipe)
        in_a_moment(lambda stage=stage: appeared(cache, stage), process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        # The last stage is so short that the kill may have come after it.
        assert list(cache.glob(".*.partial")) or stage == stages[-1]
        assert not (cache / undisturbed.fingerprint).exists() or is_complete(cache / undisturbed.fingerprint)
    again = prepare(recipe, progress=False)
    assert again.directory == cache / undisturbed.fingerprint
    assert contents(again.directory) == contents(undisturbed.directory)
    assert not list(cache.glob(".*"))


def test_of_two_at_once_one_works_and_the_other_waits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, cache = make_recipe(), tmp_path / "cache"
    name = fingerprint(recipe, locate_sources(recipe, cache))
    with only_one(cache, name, lambda: pytest.fail("nobody holds it")):
        processes = [start(recipe) for _ in range(2)]
        for process in processes:
            assert process.stderr
            assert process.stderr.readline() == "another process is preparing this data; waiting for it\n"
    finished = [finish(process) for process in processes]
    assert {output for output, _ in finished} == {str(cache / name)}
    assert sorted("tokenising" in log for _, log in finished) == [False, True]
    assert is_complete(cache / name)
    assert not list(cache.glob(".*"))


@pytest.mark.parametrize("limit", [20_000, 400_000])
def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, limit: int
) -> None:
    """A limit on file sizes stands for the disk: the first is met by the copy of the text, the second by the rows."""
    output, errors = finish(start(make_recipe(tokenizer={"train": {"vocab_size": 270}}), limit))
    assert "Exception ignored" not in errors
    assert output.startswith("StorageError prepared data cannot be written under ")
    assert output.endswith("make room, or name another folder with data.cache_directory or ZEROFLEET_CACHE")
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"files", "locks"}


def test_an_interrupted_preparation_cleans_up(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    process = start(make_recipe())
    in_a_moment(lambda: appeared(tmp_path / "cache", "tokenizer/tokenizer.json"), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"files", "locks"}


def always(folder: Path) -> bool:
    return True


def test_the_second_to_finish_drops_its_work_where_there_are_no_locks(tmp_path: Path) -> None:
    with building(tmp_path, "name", always) as mine:
        (mine / "content").write_text("mine")
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "content").write_text("theirs")
    assert (tmp_path / "name/content").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_damaged_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "leftover").write_text("")
    with building(tmp_path, "name", lambda folder: False) as folder:
        (folder / "content").write_text("whole")
    assert contents(tmp_path / "name") == {"content": b"whole"}


def test_leftovers_are_removed_when_their_maker_is_dead_and_only_then(tmp_path: Path) -> None:
    here = socket.gethostname()
    names = ["mine", "dead", "alive", "elsewhere", "abandoned"]
    hosts = [here, here, here, "other.example", "other.example"]
    folders = {name: tmp_path / f".{name}.{host}.1.partial" for name, host in zip(names, hosts, strict=True)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").write_text("")
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    for path in (folders["abandoned"] / "file", folders["abandoned"], folders["alive"]):
        os.utime(path, (long_ago, long_ago))
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks/alive").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with only_one(tmp_path, "mine", lambda: pytest.fail("nobody holds it")):
            pass
    assert {name for name, folder in folders.items() if folder.exists()} == {"alive", "elsewhere"}


def test_one_waits_for_the_other(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with only_one(tmp_path, "name", waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with only_one(tmp_path, "name", lambda: pytest.fail("nobody holds it")):
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_using_what_is_there_writes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """So a cache may be shared with users who cannot write it (a test that runs as root cannot show more)."""
    recipe = make_recipe()
    prepare(recipe, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    prepare(recipe, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert len(before) > 5


def test_the_error_of_an_unwritable_cache_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with (
        pytest.raises(StorageError, match=r"data\.cache_directory or ZEROFLEET_CACHE"),
        only_one(tmp_path / "file", "name", lambda: None),
    ):
        pass
