"""Optimizer states on NVMe: files are really written, nothing is learned otherwise, and checkpoints are like others.

DeepSpeed compiles `async_io` and `pin_memory` for it, once in a TORCH_EXTENSIONS_DIR; the first test here has it do so.
"""

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
from tests.support.nvme_settings import SETTINGS, STEPS, on_nvme
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.nvme,
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/usr/include/libaio.h").is_file(), reason="libaio-dev is not installed"),
]

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
SMALL_BUCKET = "deepspeed.overrides.zero_optimization.reduce_bucket_size=300000"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


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


def test_deepspeed_keeps_its_swap_files_to_itself() -> None:
    """Why `swapped_states` is there: its own states are empty while they are in files, and only copied files go on."""
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "torch.empty(0, dtype=" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions)
    load = inspect.getsource(DeepSpeedEngine.load_checkpoint)
    assert "if load_zero_checkpoint and not self.zero_nvme_offload_optimizer():" in load
    assert "copytree(offload_ckpt_dir, offload_dir" in load
