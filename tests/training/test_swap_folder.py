"""The folder on each node for optimizer states on NVMe: whose it is, and what is said where it cannot be."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.forked import ForkServer
from tests.support.nvme_settings import SETTINGS, on_nvme

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


@pytest.mark.distributed
def test_a_start_removes_what_killed_ones_left_and_nothing_of_others(
    fork_server: ForkServer, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "somebody's").touch()
    directory, _ = make_run(*SETTINGS, *on_nvme(folder))
    (outcome,) = fork_server.run(1, "nvme_cases:start_and_die", run_directory=str(directory.path))
    assert outcome["signal"] == 9
    (left,) = folder.glob("zerofleet-*/states.swp")
    ((alone, both, after),) = fork_server.results(1, "nvme_cases:start_beside", run_directory=str(directory.path))
    assert not left.exists()
    assert [len(alone), len(both)] == [2, 3], "somebody's, and one of each start that lives"
    assert after == ["somebody's"]


def needed(plan: Plan) -> int:
    assert plan.ranks is not None
    return plan.ranks[0].nvme_bytes


@pytest.mark.distributed
def test_a_folder_that_is_not_there_or_no_folder(fork_server: ForkServer, make_run: MakeRun, tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    for path, text in (
        (missing, f"zero.nvme_path: there is no folder {missing} on "),
        (file, f"zero.nvme_path: {file} on "),
    ):
        directory, _ = make_run(*SETTINGS, *on_nvme(path))
        for answer in fork_server.results(2, "nvme_cases:refusal", run_directory=str(directory.path)):
            assert text in answer
            assert ("make it, or name one that each node has" if path == missing else "is not a directory") in answer


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["too small", "full", "room", "no direct writes"])
def test_a_disk_that_cannot_take_the_files(
    kind: str, fork_server: ForkServer, make_run: MakeRun, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("hardware: a file system of its own needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    directory, plan = make_run(*SETTINGS, *on_nvme(folder), workers=1)
    pages = math.ceil(needed(plan) / 4096) * 4096
    sizes = {"too small": (pages // 2, 0), "full": (2**20, 2**20), "room": (pages + 2**16, 0)}
    size, fill = sizes.get(kind, (0, 0))
    (answer,) = fork_server.results(
        1, "nvme_cases:refusal", run_directory=str(directory.path),
        file_system="tmpfs" if size else "ramfs", folder=str(folder), room=size, fill=fill,
    )  # fmt: skip
    if kind == "room":
        assert answer is None
        return
    assert answer is not None
    assert f"zero.nvme_path: {folder} on " in answer
    if kind == "no direct writes":
        assert "cannot be written past the page cache (O_DIRECT: Invalid argument)" in answer
    else:
        free = 0.0 if kind == "full" else size / 2**20
        assert f"has {free:,.1f} MiB free of {size / 2**20:,.1f} MiB, and this node's ranks write " in answer
        assert f"write {needed(plan) / 2**20:,.1f} MiB there; free some" in answer
