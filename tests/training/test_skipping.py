"""A bad batch is left out where the run is: what follows is what a run makes that never had the batch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, append_json_line, read_json_lines
from launcher.training.skipping import why_not_in_place
from tests.support.ranks import Ranks

MakeRun = Callable[..., tuple[RunDirectory, Plan]]

STEPS = 16
BAD = {0: ("nan", 0), 3: ("nan", 1), 14: ("spike", 0)}
"""Batch, from 0: what is wrong with it, on which rank. A spike needs ten steps to be told from."""

ADALORA = (
    "adapter={method: adalora, r: 2, target_modules: [q_proj, v_proj], "
    "adalora: {init_r: 4, initial_steps: 3, final_steps: 4, interval: 2, orthogonality: 0.3}}"
)
MIXTRAL = (
    "model.config={model_type: mixtral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, num_local_experts: 4, "
    "num_experts_per_tok: 2}"
)
SETTINGS = [
    *[(f"zero.stage={stage}",) for stage in (2, 0, 1, 3)],
    *[(f"zero.stage={stage}", "gradient_accumulation_steps=1") for stage in (2, 3)],
    *[(f"zero.stage={stage}", "precision=bf16") for stage in (3, 0, 1, 2)],
    *[(f"zero.stage={stage}", "tensor_parallel_size=2") for stage in (0, 3)],
    *[(f"zero.stage={stage}", "precision=fp16") for stage in (2, 0, 1, 3)],
    *[(f"zero.stage={stage}", "sequence_parallel_size=2") for stage in (2, 3)],
    *[(f"zero.stage={stage}", "zero.offload_optimizer=cpu", "precision=bf16") for stage in (3, 2)],
    *[(f"zero.stage={stage}", "optimizer.type=muon", "max_grad_norm=0") for stage in (1, 2, 0)],
    ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"),
    ("zero.stage=2", "optimizer.type=lion", "training.ema.decay=0.9", "optimizer.decay_to_start=0.1"),
    ("zero.stage=1", ADALORA),
    ("zero.stage=2", "expert_parallel_size=2", MIXTRAL),
    ("zero.stage=2", "training.adversarial.method=fgm"),
]


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.usefixtures("fp16_on_any_cpu")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings)[:60])
def test_what_follows_is_as_if_the_batch_had_never_been(
    settings: tuple[str, ...], two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    common = (*settings, f"max_steps={STEPS}", "model.config.attention_dropout=0.1", "save_steps=8", "eval_steps=8")
    directory, plan = make_run(*common, "on_bad_loss=skip", "loss_spike_factor=3", name="skipping")
    size, forwards = plan.batch.global_batch_size, plan.batch.gradient_accumulation_steps
    spoils = [
        # Of the micro batches the last one, and of the spike the first: what is thrown away is more than one.
        {"rank": rank, "forward": batch * forwards + (0 if what == "spike" else forwards - 1), "factor": factor}
        for batch, (what, rank) in BAD.items()
        for factor in [math.nan if what == "nan" else 1000.0]
    ]
    spoils.append({"rank": 1, "forward": 3 * forwards, "factor": math.inf})
    data = str(prepared.directory)
    found = two_ranks.call("spoiled_cases:run_spoiled", run_directory=str(directory.path), data=data, spoils=spoils)
    assert found[0]["status"] == "complete"
    assert sum("these samples are left out" in notice for notice in found[0]["notices"]) == len(BAD)
    skipped = read_json_lines(directory.skipped)
    assert [(record["begin"], record["end"]) for record in skipped] == [(b * size, (b + 1) * size) for b in BAD]
    assert [record["step"] for record in skipped] == [1, 3, 13]

    never, _ = make_run(*common, "on_bad_loss=rollback", name="never")
    for record in skipped:
        append_json_line(never.skipped, record)
    two_ranks.call("cases:run", run_directory=str(never.path), data=data)
    assert figures(directory) == figures(never)
    for rank in range(2):
        path = f"samples_{rank:05d}.jsonl"
        assert read_json_lines(directory.logs / path) == read_json_lines(never.logs / path)


def figures(directory: RunDirectory) -> list[dict[str, Any]]:
    """What each step and each evaluation of a run measured, bit for bit, and but for times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "eval_loss")
    return [{name: record.get(name) for name in names} for record in read_json_lines(directory.metrics)]


@pytest.mark.distributed
def test_a_model_that_is_lost_is_not_skipped_for_ever(
    two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, plan = make_run("on_bad_loss=skip", "max_bad_losses=2")
    spoils = [{"rank": 0, "forward": number, "factor": math.nan} for number in range(4, 100)]
    found = two_ranks.call(
        "spoiled_cases:refusal_of_spoiled",
        run_directory=str(directory.path),
        data=str(prepared.directory),
        spoils=spoils,
    )
    size = plan.batch.global_batch_size
    assert found[0] == found[1]
    assert found[0] == (
        f"the loss of step 3 is nan (samples {4 * size} to {5 * size - 1}), and 2 batches are left out already "
        "(fault_tolerance.max_bad_losses 2); lower training.learning_rate, or look at the samples in skipped.jsonl"
    )
    assert len(read_json_lines(directory.skipped)) == 2


def test_where_a_bad_batch_costs_a_restart(make_run: MakeRun) -> None:
    _, plain = make_run(name="plain")
    assert why_not_in_place(plain, nn.LayerNorm(4)) is None
    assert "batch normalisation" in str(why_not_in_place(plain, nn.Sequential(nn.BatchNorm2d(4))))
    _, piped = make_run("pipeline_parallel_size=2", "zero.stage=1", name="piped")
    assert "pipeline" in str(why_not_in_place(piped, nn.LayerNorm(4)))
    _, on_nvme = make_run("zero.stage=3", "zero.offload_optimizer=nvme", "zero.nvme_path=/scratch", name="nvme")
    assert "NVMe" in str(why_not_in_place(on_nvme, nn.LayerNorm(4)))
