"""Layers that torch compiles learn what a plain process does; other kernels are used where there are any."""

from collections.abc import Callable, Iterator

import pytest
import torch

from launcher.data.store import PreparedData
from launcher.models.compiling import use_kernels
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.equality import Equality, RanksOf
from tests.support.ranks import Ranks

MakeRun = Callable[..., tuple[RunDirectory, Plan]]

COMPILED = {
    "zero 2": ("llama", ("zero.stage=2",)),
    "zero 0": ("llama", ("zero.stage=0",)),
    "zero 1 checkpointing": ("llama", ("zero.stage=1", "gradient_checkpointing=true")),
    "bf16": ("llama", ("zero.stage=1", "precision=bf16")),
    "qwen3": ("qwen3", ("zero.stage=2",)),
    "mistral": ("mistral", ("zero.stage=2",)),
}


@pytest.fixture
def compiler(one_rank: Ranks) -> Iterator[None]:
    """The ranks of tests run without torch's compiler; a run that compiles turns it on."""
    yield
    one_rank.call("cases:compile_no_more")


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.timeout(900)  # of a compiler that has compiled nothing before
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers(name: str, ranks_of: RanksOf, equality: Equality, compiler: None) -> None:
    family, settings = COMPILED[name]
    rounding = {"loss": 2e-2, "norm": 5e-2} if name == "bf16" else {}
    model = equality.model(family, **({"head_dim": 8} if family == "qwen3" else {}))
    before = ranks_of(1).call("cases:compiled_graphs")[0]
    equality.check(ranks_of(1), "torch_compile=true", *settings, model=model, **rounding)
    assert ranks_of(1).call("cases:compiled_graphs")[0] > before


@pytest.mark.distributed
def test_without_a_gpu_pytorchs_own_kernels_are_used_and_that_is_said(
    one_rank: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run("model.kernels=auto", "max_steps=1", workers=1)
    (result,) = one_rank.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert result["notices"] == ["model.kernels: auto uses PyTorch's own kernels: Liger's need a GPU"]


def test_kernels_are_not_asked_for_unless_the_recipe_does(make_run: MakeRun) -> None:
    _, plan = make_run()
    assert use_kernels(torch.nn.Linear(1, 1), plan, torch.device("cuda")) is None


def test_ligers_kernels_compute_what_pytorchs_do(make_run: MakeRun) -> None:
    if not torch.cuda.is_available():
        pytest.skip("hardware: needs a GPU")
    pytest.importorskip("liger_kernel", reason="hardware: liger-kernel is for GPUs")
    from transformers import AutoModelForCausalLM

    from launcher.models.build import build_model

    _, plan = make_run("model.kernels=auto", workers=1)
    device = torch.device("cuda")
    plain, fused = (build_model(plan, AutoModelForCausalLM).to(device) for _ in range(2))
    assert use_kernels(fused, plan, device) is None
    ids = torch.arange(32, device=device)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
