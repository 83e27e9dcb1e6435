"""Every ZeRO stage gives the per-step losses and gradient norms of one plain PyTorch process on the same batches.

Accumulation is on, clipping is active at every step, the counts of targets differ between micro batches, and the
learning rate warms up. Tolerance 1e-5 in fp32 over 20 steps: sums of a few hundred float32 terms in another order.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support import reference
from tests.support.ranks import Ranks

STEPS = 20
MakeRun = Callable[..., tuple[RunDirectory, Plan]]


def pretrained(folder: Path) -> tuple[str, ...]:
    return ("model.config=null", f"model.model_name_or_path={folder}", "tokenizer.train=null")


@pytest.fixture(scope="module")
def expected(base_recipe: Path, model_folder: Path) -> tuple[PreparedData, reference.Reference]:
    from launcher.recipe.loading import load_recipe

    recipe = load_recipe(base_recipe, pretrained(model_folder))
    data = prepare(recipe, progress=False)
    return data, reference.train(data.directory, model_folder, recipe, global_batch_size=8, steps=STEPS)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_plain_pytorch(
    stage: int,
    two_ranks: Ranks,
    make_run: MakeRun,
    model_folder: Path,
    expected: tuple[PreparedData, reference.Reference],
) -> None:
    data, plain = expected
    directory, _ = make_run(*pretrained(model_folder), f"zero.stage={stage}")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(plain.grad_norms, rel=1e-4)
    assert min(plain.grad_norms) > 0.2, "clipping was not active at every step"
    assert plain.losses[0] - plain.losses[-1] > 0.3, "the model did not learn, so equal losses would show little"


@pytest.mark.distributed
def test_random_weights_do_not_depend_on_the_stage(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    sums = []
    for stage in (0, 3):
        directory, _ = make_run(f"zero.stage={stage}", name=f"stage{stage}")
        first, second = two_ranks.call(
            "cases:initial_weights", run_directory=str(directory.path), data=str(prepared.directory)
        )
        assert first == second
        sums.append(first)
    assert sums[0] == sums[1]
    assert sums[0]["model.layers.0.self_attn.q_proj.weight"] != sums[0]["model.layers.1.self_attn.q_proj.weight"]
