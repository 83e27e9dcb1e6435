"""What is done with a model that is spread over ranks: it is evaluated, generates, is saved, resumed and exported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.checkpoints import folders
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.training.export import export_checkpoint
from tests.support.equality import MIXTURES, STEPS, Equality, RanksOf

pytestmark = pytest.mark.matrix

MakeRun = Callable[..., tuple[RunDirectory, Plan]]

IDS = [[5, 9, 200, 3, 77, 150, 8, 1]]
LAYOUTS = {
    "tensor ZeRO 0": ("tensor_parallel_size=2", "zero.stage=0"),
    "tensor ZeRO 1": ("tensor_parallel_size=2", "zero.stage=1"),
    "tensor ZeRO 1 tied": ("tensor_parallel_size=2", "zero.stage=1"),
    "tensor ZeRO 3 tied": ("tensor_parallel_size=2", "zero.stage=3"),
    "tensor ZeRO 3": ("tensor_parallel_size=2", "zero.stage=3"),
    "sequence ZeRO 2": ("sequence_parallel_size=2", "zero.stage=2"),
    "sequence ZeRO 3": ("sequence_parallel_size=2", "zero.stage=3"),
    "pipeline": ("pipeline_parallel_size=2", "zero.stage=1"),
    "pipeline tied": ("pipeline_parallel_size=2", "zero.stage=1"),
    "pipeline tensor": ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1"),
    "pipeline tensor tied": ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1"),
    "expert mixtral ZeRO 1 tied": ("expert_parallel_size=4", "zero.stage=1"),
    "expert mixtral ZeRO 2": ("expert_parallel_size=2", "zero.stage=2", "router_aux_loss_coef=0.3"),
    "expert qwen2_moe": ("expert_parallel_size=4", "zero.stage=2"),
    "expert qwen3_moe": ("expert_parallel_size=2", "zero.stage=2"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spread_model_is_evaluated_resumed_and_exported(
    layout: str, ranks_of: RanksOf, equality: Equality, tmp_path: Path
) -> None:
    """The run stops in the middle and continues as the plain process does without a stop."""
    model, settings = equality.model(tie_word_embeddings="tied" in layout), LAYOUTS[layout]
    data_parallel = 2
    if "expert" in layout:
        family = layout.split()[1]
        model = equality.model(family, **MIXTURES[family], tie_word_embeddings="tied" in layout)
        data_parallel = 4
    elif layout.startswith("pipeline tensor"):
        data_parallel = 1
    generates = "pipeline" not in layout and "expert" not in layout
    if generates:
        settings = (*settings, 'evaluation.generate={prompts: ["import "], max_new_tokens: 4}')
    directory, plan, _ = equality.run(
        ranks_of(4), model, *settings, "save_steps=10", "eval_steps=10", "max_eval_samples=5",
        data_parallel=data_parallel, stop_after=9,
    )  # fmt: skip
    data, plain = equality.reference(model, plan)
    ranks_of(4).call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    losses = {r["step"]: r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r}
    assert list(losses.values()) == pytest.approx(plain.losses, abs=2e-6, rel=0)
    assert list(losses) == list(range(1, STEPS + 1))

    folder = folders.complete(directory.checkpoints)[-1]
    export_checkpoint(folder, plan, equality.tokenizer, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        actual = exported(torch.tensor(IDS), use_cache=False).logits
    by_rank = ranks_of(4).call(
        "cases:logits", run_directory=str(directory.path), data=str(data.directory), input_ids=IDS
    )
    ranks = (2, 3) if layout.startswith("pipeline tensor") else (3,)  # each has a part of the vocabulary
    expected = torch.cat([torch.tensor(by_rank[rank]) for rank in ranks], dim=-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    (evaluation,) = [r for r in read_json_lines(directory.metrics) if r.get("eval_loss") and r["step"] == STEPS]
    total, count = equality.evaluate(exported, data, 5)
    assert evaluation["eval_loss"] == pytest.approx(total / count, abs=2e-6)
    assert evaluation["eval_targets"] == count
    if not generates:
        return
    texts = [json.loads(line) for line in (directory.path / "samples.jsonl").read_text().splitlines()]
    assert [text["step"] for text in texts] == [10, 20]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        ("tensor_parallel_size=2", "zero.stage=1"),
        ("tensor_parallel_size=2", "zero.stage=3"),
        ("pipeline_parallel_size=2", "zero.stage=1"),
    ],
)
def test_random_weights_do_not_depend_on_the_layout(
    settings: tuple[str, ...], ranks_of: RanksOf, make_run: MakeRun, prepared: PreparedData
) -> None:
    losses = []
    for workers, changes in ((1, ()), (2, settings)):
        directory, _ = make_run(
            *("max_steps=2", "micro_batch_size=2", "gradient_accumulation_steps=2"), *changes,
            workers=workers, name=f"run{workers}",
        )  # fmt: skip
        ranks_of(workers).call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        losses.append([r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r])
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
