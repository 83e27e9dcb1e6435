"""Averages of the weights: those of plain PyTorch under every ZeRO stage, resumed bit by bit, exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import read_manifest
from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.errors import CheckpointError, ExpectedError, PlanError
from launcher.planning.methods import with_average
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.training.consolidation import averaged_weights, trained_state_dict, whole_weights
from launcher.training.export import export_checkpoint
from launcher.training.offline import evaluate_checkpoint
from tests.support.equality import RanksOf
from tests.support.ranks import Ranks

pytestmark = pytest.mark.distributed

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
DECAY = 0.8
EVERY_STEP = (
    "max_steps=6", "save_steps=1", "save_total_limit=null", "eval_steps=3", "training.ema={decay: 0.8}",
    "evaluation.max_eval_samples=8",
)  # fmt: skip


def train(ranks: Ranks, directory: RunDirectory, prepared: PreparedData, **more: Any) -> list[Any]:
    results: list[Any] = ranks.call(
        "cases:run", run_directory=str(directory.path), data=str(prepared.directory), **more
    )
    return results


def weights_of(folder: Path, averaged: bool) -> dict[str, torch.Tensor]:
    read = averaged_weights if averaged else whole_weights
    return {name: values.detach().clone() for name, values in read(folder, read_manifest(folder))}


def evaluated(directory: RunDirectory) -> dict[int, float]:
    return {r["step"]: r["eval_loss"] for r in read_json_lines(directory.metrics) if "eval_loss" in r}


STAGES = [
    pytest.param(("zero.stage=2",), id="zero2", marks=pytest.mark.matrix),
    pytest.param(("zero.stage=3",), id="zero3"),
    pytest.param(("zero.stage=0",), id="zero0", marks=pytest.mark.matrix),
    pytest.param(("zero.stage=1", "precision=bf16"), id="zero1-bf16", marks=pytest.mark.matrix),
    pytest.param(("zero.stage=2", "zero.offload_optimizer=cpu"), id="zero2-offload", marks=pytest.mark.matrix),
    pytest.param(("zero.stage=3", "precision=bf16"), id="zero3-bf16", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_that_of_plain_pytorch(
    tmp_path: Path, two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData, stage: tuple[str, ...]
) -> None:
    """From the weights after each step, which the checkpoints hold; resumed in the middle bit by bit."""
    directory, plan = make_run(*EVERY_STEP, *stage, name="whole")
    train(two_ranks, directory, prepared)
    saved = folders.complete(directory.checkpoints)
    assert len(saved) == 6
    plain = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    expected = weights_of(saved[0], averaged=True)  # the first average needs the weights before the first step
    for folder in saved[1:]:
        own, found = weights_of(folder, averaged=False), weights_of(folder, averaged=True)
        names = [name for name in expected if expected[name].is_floating_point()]
        plain([expected[name] for name in names], [own[name].float() for name in names], None)
        assert max(float((expected[name] - found[name]).abs().max()) for name in names) < 1e-6
        assert max(float((own[name] - found[name]).abs().max()) for name in names) > 1e-4
    halves, _ = make_run(*EVERY_STEP, *stage, name="halves")
    train(two_ranks, halves, prepared, stop_after=2)
    assert folders.complete(halves.checkpoints)[-1].name == saved[2].name
    train(two_ranks, halves, prepared)
    again = weights_of(folders.complete(halves.checkpoints)[-1], averaged=True)
    last = weights_of(saved[-1], averaged=True)
    assert all(torch.equal(values, again[name]) for name, values in last.items())
    assert evaluated(halves) == evaluated(directory)

    measured, _ = evaluate_checkpoint(saved[-1], plan, prepared, 8)
    exact = 1e-4 if plan.recipe.training.precision == "fp32" else 2e-2
    assert measured.loss == pytest.approx(evaluated(directory)[6], rel=exact), "what was evaluated is the average"
    bare = plan.model_copy(update={"recipe": with_average(plan.recipe, False)})
    raw, _ = evaluate_checkpoint(saved[-1], bare, prepared, 8)
    assert abs(raw.loss - measured.loss) > 1e-2
    target = export_checkpoint(saved[-1], plan, prepared.tokenizer_directory, tmp_path / "averaged")
    exported = load_file(target / "model.safetensors")
    dtype = next(iter(exported.values())).dtype
    assert exported
    assert all(torch.equal(values, last[name].to(dtype)) for name, values in exported.items())


def test_the_first_average_is_the_first_weights(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    """Average 1 = decay x first weights + (1 - decay) x weights 1; the first weights are those of a rate of nothing."""
    settings = ("max_steps=1", "zero.stage=2", "eval_steps=null", "training.ema={decay: 0.8}")
    still, _ = make_run(*settings, "learning_rate=1e-30", name="still")
    moved, _ = make_run(*settings, "warmup_steps=0", name="moved")
    for directory in (still, moved):
        train(two_ranks, directory, prepared)
    first, own, average = (
        weights_of(folders.complete(directory.checkpoints)[-1], averaged=averaged)
        for directory, averaged in ((still, False), (moved, False), (moved, True))
    )
    for name, values in average.items():
        torch.testing.assert_close(values, DECAY * first[name] + (1 - DECAY) * own[name], atol=1e-6, rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("before", "after"),
    [("2 on 1", "3 on 2"), ("3 on 2", "2 on 2"), ("2 on 2", "0 on 1"), ("0 on 1", "2 on 2"), ("3 on 1", "1 on 2")],
)
def test_the_average_goes_over_to_another_layout(
    ranks_of: RanksOf, make_run: MakeRun, prepared: PreparedData, before: str, after: str
) -> None:
    (stage, workers), (next_stage, next_workers) = (map(int, layout.split(" on ")) for layout in (before, after))
    batch = ("gradient_accumulation_steps=null", "global_batch_size=8")
    first, _ = make_run(*EVERY_STEP, *batch, f"zero.stage={stage}", workers=workers)
    train(ranks_of(workers), first, prepared, stop_after=2)
    then = weights_of(folders.complete(first.checkpoints)[-1], averaged=True)
    # With a rate of nothing and a decay of almost 1 the average stays as it was.
    still = ("learning_rate=1e-30", "training.ema.decay=0.9999999", "max_steps=4", "eval_steps=null")
    second, _ = make_run(*EVERY_STEP, *batch, f"zero.stage={next_stage}", *still, workers=next_workers)
    train(ranks_of(next_workers), second, prepared)
    newest = folders.complete(second.checkpoints)[-1]
    assert (folders.step_of(newest), read_manifest(newest).layout.world_size) == (4, next_workers)
    now = weights_of(newest, averaged=True)
    assert set(now) == set(then)
    for name, values in then.items():
        torch.testing.assert_close(now[name], values, atol=1e-6, rtol=0)


def test_a_run_may_begin_to_average_later(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    settings = ("max_steps=3", "zero.stage=2", "eval_steps=null")
    plain, plan = make_run(*settings)
    train(two_ranks, plain, prepared, stop_after=1)
    folder = folders.complete(plain.checkpoints)[-1]
    with pytest.raises(CheckpointError, match=r"was saved without training\.ema"):
        weights_of(folder, averaged=True)
    with pytest.raises(ExpectedError, match=r"has no training\.ema"):
        with_average(plan.recipe, True)
    later, _ = make_run(*settings, "training.ema={decay: 0.5}")
    results = train(two_ranks, later, prepared)
    assert any("was saved without training.ema" in notice for notice in results[0]["notices"])
    before, after = weights_of(folder, averaged=False), folders.complete(later.checkpoints)[-1]
    own, average = weights_of(after, averaged=False), weights_of(after, averaged=True)
    for name, values in average.items():
        torch.testing.assert_close(values, (before[name] + own[name]) / 2, atol=1e-6, rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["2", "3", "0"])
def test_an_adapters_average_is_that_of_its_own_weights(
    tmp_path: Path, two_ranks: Ranks, model_folder: Path, make_run: MakeRun, prepared: PreparedData, stage: str
) -> None:
    directory, plan = make_run(
        "model.config=null", f"model.model_name_or_path={model_folder}", "tokenizer.train=null", "adapter.method=lora",
        "max_steps=3", "save_steps=1", "save_total_limit=null", f"zero.stage={stage}", "eval_steps=null",
        "learning_rate=0.01", "warmup_steps=0", "training.ema={decay: 0.8}",
    )  # fmt: skip
    data = prepare(plan.recipe, progress=False)
    train(two_ranks, directory, data)
    saved = folders.complete(directory.checkpoints)
    own, averages = (trained_state_dict(saved[2], int(stage)), [weights_of(path, averaged=True) for path in saved])
    trained = set(own)
    assert trained
    assert all("lora_" in name for name in trained)
    for name in trained:
        expected = averages[1][name] * DECAY + own[name] * (1 - DECAY)
        torch.testing.assert_close(averages[2][name], expected, atol=1e-6, rtol=0)
    target = export_checkpoint(saved[2], plan, data.tokenizer_directory, tmp_path / "export")
    exported = load_file(target / "adapter" / "adapter_model.safetensors")
    assert len(exported) == len(trained)
    for name, values in exported.items():
        full = name.replace(".weight", ".default.weight")
        torch.testing.assert_close(values, averages[2][full], atol=1e-7, rtol=0)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_the_plan_counts_its_memory(make_run: MakeRun, two_ranks: Ranks, prepared: PreparedData, stage: str) -> None:
    settings = ("max_steps=1", "eval_steps=null", f"zero.stage={stage}")
    (_, without), (directory, plan) = make_run(*settings), make_run(*settings, "training.ema={decay: 0.5}", name="ema")
    train(two_ranks, directory, prepared)
    (folder,) = folders.complete(directory.checkpoints)
    files = sorted(folder.glob("ema_rank_*.pt"))
    assert len(files) == (1 if stage == "0" else 2)
    size = max(sum(values.numel() for values in torch.load(file)["averages"]) * 4 for file in files)
    assert plan.memory is not None
    assert without.memory is not None
    assert plan.memory.optimizer - without.memory.optimizer == size


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("zero.stage=0", "precision=bf16"), r"ZeRO stage 0 in bf16 keeps them in a form of its own"),
        (("zero.stage=2", "precision=fp16"), "is proved in fp32 and bf16"),
        (("parallel.tensor_parallel_size=2", "zero.stage=1"), "is for data parallel runs"),
        (("deepspeed.overrides={data_types: {grad_accum_dtype: fp32}}", "zero.stage=1"), "grad_accum_dtype"),
    ],
)
def test_what_is_not_proved_is_refused(make_run: MakeRun, overrides: tuple[str, ...], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make_run(*overrides, "training.ema={decay: 0.9}")
