"""Optimizer states on NVMe: files are really written, nothing is learned otherwise, and checkpoints are like others.

DeepSpeed compiles `async_io` and `pin_memory` for it, once in a TORCH_EXTENSIONS_DIR; the first test here has it do so.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from safetensors.torch import load_file

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import read_manifest
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.training.export import export_checkpoint
from tests.support.equality import RanksOf
from tests.support.forked import ForkServer
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.nvme,
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/usr/include/libaio.h").is_file(), reason="libaio-dev is not installed"),
]

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
STEPS = 8
MODEL = (
    "model.config={model_type: llama, hidden_size: 128, intermediate_size: 4096, num_hidden_layers: 1,"
    " num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64}"
)
"""Half of a matrix of its MLP is 1 MiB of gradients, the least that passes through a file."""
SETTINGS = (
    MODEL, "zero.stage=3", "deepspeed.overrides.zero_optimization.sub_group_size=300000", f"max_steps={STEPS}",
    "micro_batch_size=1", "gradient_accumulation_steps=null", "global_batch_size=4", "eval_steps=1000",
)  # fmt: skip
"""Two sub-groups of the matrices are in files; the rest of them and the norms are too small for it."""
SMALL_BUCKET = "deepspeed.overrides.zero_optimization.reduce_bucket_size=300000"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


def on_nvme(disk: Path) -> tuple[str, ...]:
    return ("zero.offload_optimizer=nvme", f"zero.nvme_path={disk}")


def losses(directory: RunDirectory) -> dict[int, Any]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_json_lines(directory.metrics) if "loss" in r}


def exported(directory: RunDirectory, plan: Plan, data: PreparedData) -> dict[str, torch.Tensor]:
    target = directory.path / "exported"
    export_checkpoint(folders.complete(directory.checkpoints)[-1], plan, data.tokenizer_directory, target)
    return load_file(target / "model.safetensors")


@pytest.fixture(scope="module")
def plain(
    two_ranks: Ranks, module_run: MakeRun, prepared: PreparedData
) -> Iterator[dict[str, tuple[RunDirectory, Plan]]]:
    """The same runs with states in host memory, by precision, which `test_layouts_precision.py` holds against PyTorch.

    Without any offload DeepSpeed sums the squares of the gradient norm in another order.
    """
    runs = {}
    for precision in ("fp32", "bf16"):
        settings = (*SETTINGS, "zero.offload_optimizer=cpu", f"precision={precision}")
        directory, plan = module_run(*settings, name=f"plain_{precision}")
        two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        runs[precision] = directory, plan
    return runs


@pytest.mark.timeout(1200)  # the first time in a TORCH_EXTENSIONS_DIR
def test_the_operation_is_compiled_and_a_lock_of_a_killed_process_does_not_hold_it_up(one_rank: Ranks) -> None:
    assert one_rank.call("nvme_cases:refusal_to_compile") == [
        "recipe: 1 problem\n  zero.offload_optimizer: is nvme, and DeepSpeed cannot compile its async_io operation "
        "here: install libaio's headers (Debian: libaio-dev) and a C++ compiler on each node, or set it to cpu"
    ]
    assert one_rank.call("nvme_cases:compiled") == [True]


@pytest.mark.parametrize(("precision", "asynchronous"), [("fp32", True), ("bf16", False)])
def test_files_are_written_and_nothing_else_is_learned(
    precision: str,
    asynchronous: bool,
    two_ranks: Ranks,
    make_run: MakeRun,
    prepared: PreparedData,
    plain: dict[str, tuple[RunDirectory, Plan]],
    disk: Path,
) -> None:
    saves = f"checkpoint.asynchronous={str(asynchronous).lower()}"
    directory, plan = make_run(*SETTINGS, *on_nvme(disk), f"precision={precision}", saves)
    arguments = {"run_directory": str(directory.path), "data": str(prepared.directory)}
    sizes = two_ranks.call("nvme_cases:run", **arguments, folder=str(disk))[0]
    unlike, like = plain[precision][0], directory
    assert losses(like) == losses(unlike)
    assert len(losses(like)) == STEPS
    assert plan.memory is not None
    for rank in range(2):
        own = {name: size for name, size in sizes.items() if f"/rank{rank}/" in name}
        assert sum(own.values()) == plan.memory.nvme > 10 * 2**20
        assert sum("gradient" in name for name in own) == 3
        assert sum("exp_avg" in name for name in own) == 2 * 2
        assert len(own) == 2 * 3 + 3
    assert list(disk.iterdir()) == [], "nothing is left at the end"
    saved = folders.complete(directory.checkpoints)[-1]
    assert not (saved / "offloaded_tensors").exists()
    assert set(read_manifest(saved).files) == set(read_manifest(folders.complete(unlike.checkpoints)[-1]).files)
    mine, other = exported(directory, plan, prepared), exported(unlike, plain[precision][1], prepared)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plan_is_what_a_rank_holds_besides(precision: str, two_ranks: Ranks, make_run: MakeRun, disk: Path) -> None:
    directory, plan = make_run(*SETTINGS, *on_nvme(disk), f"precision={precision}", "global_batch_size=2", SMALL_BUCKET)
    found = two_ranks.call("nvme_cases:memory", run_directory=str(directory.path))
    memory = plan.memory
    assert memory is not None
    planned = {
        "parameters": memory.parameters + memory.host_parameters,
        "gradients": memory.gradients + memory.host_gradients,
        "optimizer": memory.optimizer + memory.host_optimizer,
    }
    for kind, size in planned.items():
        assert size == pytest.approx(max(rank[kind] for rank in found), rel=0.02), kind


Legs = tuple[tuple[int, bool], tuple[int, bool]]
"""Workers, and whether their states are in files, before and after a stop."""


@pytest.fixture
def in_parts(ranks_of: RanksOf, make_run: MakeRun, prepared: PreparedData, disk: Path) -> Callable[[Legs], Any]:
    """Train in two legs; returns the losses of all steps."""

    def train(legs: Legs) -> Any:
        for stop_after, (workers, files) in zip((4, None), legs, strict=True):
            offload = on_nvme(disk) if files else ("zero.offload_optimizer=cpu",)
            directory, _ = make_run(*SETTINGS, "precision=fp32", *offload, workers=workers)
            request = {"run_directory": str(directory.path), "data": str(prepared.directory), "stop_after": stop_after}
            if files:
                ranks_of(workers).call("nvme_cases:run", **request, folder=str(disk))
            else:
                ranks_of(workers).call("cases:run", **request)
        return losses(directory)

    return train


def test_a_run_goes_on_from_its_checkpoint_exactly(
    in_parts: Callable[[Legs], Any], plain: dict[str, tuple[RunDirectory, Plan]]
) -> None:
    assert in_parts(((2, True), (2, True))) == losses(plain["fp32"][0])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "legs",
    [((2, True), (1, True)), ((1, True), (2, True)), ((2, True), (2, False)), ((2, False), (2, True))],
    ids=["fewer", "more", "from files", "to files"],
)
def test_a_run_goes_on_from_another_one(
    legs: Legs, in_parts: Callable[[Legs], Any], plain: dict[str, tuple[RunDirectory, Plan]]
) -> None:
    parts, whole = in_parts(legs), losses(plain["fp32"][0])
    assert parts.keys() == whole.keys()
    for step in whole:
        assert parts[step] == pytest.approx(whole[step], abs=2e-6, rel=1e-5)


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


def test_deepspeed_keeps_its_swap_files_to_itself() -> None:
    """Why `swapped_states` is there: its own states are empty while they are in files, and only copied files go on."""
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "torch.empty(0, dtype=" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions)
    load = inspect.getsource(DeepSpeedEngine.load_checkpoint)
    assert "if load_zero_checkpoint and not self.zero_nvme_offload_optimizer():" in load
    assert "copytree(offload_ckpt_dir, offload_dir" in load
