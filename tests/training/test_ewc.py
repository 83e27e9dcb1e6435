"""Elastic weight consolidation: the importance, and every step, are those of plain PyTorch under every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.errors import PlanError, RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support import reference
from tests.support.ranks import Ranks
from tests.training.task_runs import STDLIB, run_of, write_recipe

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
STEPS, SAMPLES = 6, 5
EARLIER = f'[{{type: text, sample_by: paragraph, files: ["{STDLIB}/csv.py"]}}]'
STRENGTH = 300.0


def settings(model_folder: Path) -> tuple[str, ...]:
    return (
        "model.config=null", f"model.model_name_or_path={model_folder}", "tokenizer.train=null", "eval_steps=null",
        f"max_steps={STEPS}", "warmup_steps=1", "optimizer.type=sgd", "learning_rate=0.05", "save_steps=100",
    )  # fmt: skip


def ewc(samples: int = SAMPLES) -> str:
    return f"optimizer.ewc={{strength: {STRENGTH}, samples: {samples}, sources: {EARLIER}}}"


def by_hand(base_recipe: Path, model_folder: Path) -> dict[str, torch.Tensor]:
    """The mean over samples of the squared gradient of each one's summed loss."""
    earlier = load_recipe(
        base_recipe, (*settings(model_folder), f"data.sources={EARLIER}", "data.validation_fraction=0")
    )
    (rows,) = prepare(earlier, progress=False).split("train")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    found = {name: torch.zeros_like(values) for name, values in model.named_parameters()}
    for index in range(SAMPLES):
        row = rows[index * len(rows) // SAMPLES]
        ids, labels, positions = (torch.from_numpy(row[k])[None] for k in ("input_ids", "labels", "position_ids"))
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        loss.backward()
        for name, values in model.named_parameters():
            found[name] += values.grad**2 / SAMPLES
    return found


STAGES = [
    pytest.param(("zero.stage=2",), id="2"),
    pytest.param(("zero.stage=3",), id="3"),
    pytest.param(("zero.stage=0",), id="0", marks=pytest.mark.matrix),
    pytest.param(("zero.stage=1",), id="1", marks=pytest.mark.matrix),
]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_that_of_plain_pytorch(
    two_ranks: Ranks, make_run: MakeRun, base_recipe: Path, model_folder: Path, stage: tuple[str, ...]
) -> None:
    """Stopped in the middle and resumed, too: the start stays where training began."""
    directory, plan = make_run(*settings(model_folder), ewc(), *stage)
    data = prepare(plan.recipe, progress=False)
    expected = by_hand(base_recipe, model_folder)
    assert data.importance is not None
    importance = load_file(data.importance)
    assert set(importance) == set(expected)
    for name, values in importance.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-7)
    call = {"run_directory": str(directory.path), "data": str(data.directory)}
    two_ranks.call("cases:run", **call, stop_after=2)
    two_ranks.call("cases:run", **call)
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    plain, without = (
        reference.train(data.directory, model_folder, plan.recipe, 8, STEPS, [], values) for values in (expected, None)
    )
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=2e-6, rel=0)
    assert [record["grad_norm"] for record in records] == pytest.approx(plain.grad_norms, rel=1e-5, abs=0)
    assert max(abs(a - b) for a, b in zip(plain.losses, without.losses, strict=True)) > 1e-4, "it changes something"


def test_the_importance_is_computed_once(make_run: MakeRun, model_folder: Path, prepared: PreparedData) -> None:
    _, plan = make_run(*settings(model_folder), ewc())
    first = prepare(plan.recipe, progress=False)
    assert first.importance is not None
    written = first.importance.stat().st_mtime_ns
    again = prepare(plan.recipe, progress=False)
    assert again.fingerprint == first.fingerprint
    assert again.importance is not None
    assert again.importance.stat().st_mtime_ns == written
    _, other = make_run(*settings(model_folder), ewc(samples=3), name="other")
    fewer = prepare(other.recipe, progress=False)
    assert fewer.fingerprint != first.fingerprint
    assert fewer.tokenizer_directory == first.tokenizer_directory
    assert len(fewer.split("train")[0]) == len(first.split("train")[0])


def test_the_plan_counts_its_memory(make_run: MakeRun, model_folder: Path) -> None:
    adamw = ("optimizer.type=adamw", "zero.stage=2")
    _, without = make_run(*settings(model_folder), *adamw)
    _, plan = make_run(*settings(model_folder), *adamw, ewc(), name="ewc")
    assert plan.memory is not None
    assert without.memory is not None
    assert plan.model is not None
    own = plan.memory.optimizer - without.memory.optimizer
    assert own == pytest.approx(2 * 4 * plan.model.num_parameters / 2, rel=0.01), "the start, and the importance"


def test_earlier_data_of_other_classes_is_refused(tmp_path: Path, model_folder: Path) -> None:
    def of(*folders: str) -> dict[str, Any]:
        files = [f"{STDLIB}/{folder}/*.py" for folder in folders]
        return {"type": "text", "files": files, "sample_by": "paragraph", "label_from_folder": True}

    recipe = write_recipe(
        tmp_path, "sequence_classification", f"{{model_name_or_path: {model_folder}}}", [of("json", "email")],
        data={"sequence_length": 32}, tokenizer={"pad_token": "<|endoftext|>"},
        optimizer={"ewc": {"strength": 1.0, "sources": [of("asyncio", "unittest")]}},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"their classes are asyncio, unittest, those of data.sources email, json"):
        run_of(recipe, tmp_path / "run")


def test_what_is_not_proved_is_refused(make_run: MakeRun, model_folder: Path) -> None:
    own = settings(model_folder)
    with pytest.raises(RecipeError, match="a pretrained model that is trained whole"):
        make_run(*own, ewc(), "adapter={method: lora}")
    with pytest.raises(RecipeError, match="a pretrained model that is trained whole"):
        make_run(ewc())
    with pytest.raises(PlanError, match="fp32 and bf16"):
        make_run(*own, ewc(), "zero.stage=2", "precision=fp16")
