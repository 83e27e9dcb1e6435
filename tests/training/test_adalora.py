"""AdaLoRA: losses and ranks are those of peft in one plain process, whatever the ZeRO stage; resumed bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoints import folders
from launcher.data.prepare import prepare
from launcher.errors import PlanError, RecipeError
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.tasks import make_task
from launcher.training.adalora import FILE
from launcher.training.consolidation import trained_state_dict
from tests.support.ranks import Ranks
from tests.support.reference import cosine_with_warmup, global_batch

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
STEPS, FIRST, LAST = 14, 3, 4
ADAPTER = (
    "adapter={method: adalora, r: 2, target_modules: [q_proj, v_proj, down_proj], "
    f"adalora: {{init_r: 4, initial_steps: {FIRST}, final_steps: {LAST}, interval: 2, orthogonality: 0.3}}}}"
)


def settings(model_folder: Path) -> tuple[str, ...]:
    return (
        "model.config=null", f"model.model_name_or_path={model_folder}", "tokenizer.train=null", ADAPTER,
        f"max_steps={STEPS}", "learning_rate=0.02", "warmup_steps=2", "save_steps=100", "eval_steps=null",
        "max_grad_norm=0.5",
    )  # fmt: skip


def plain(plan: Plan, data: Any) -> tuple[list[float], dict[str, list[bool]], dict[str, torch.Tensor]]:
    """peft's own example: backward, clip, step, `update_and_allocate`; in one process, on whole global batches."""
    task = make_task(plan.model_copy(update={"zero_stage": 0}), data.facts)
    model: Any = task.build_model().train()
    config = model.peft_config["default"]
    config.total_step, config.tinit, config.tfinal, config.deltaT = STEPS, FIRST, LAST, 2
    trained = {name: values for name, values in model.named_parameters() if values.requires_grad}
    training = plan.recipe.training
    optimizer = torch.optim.AdamW(
        [{"params": list(trained.values())}], lr=training.learning_rate, betas=(0.9, 0.95),
        weight_decay=plan.recipe.optimizer.weight_decay,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        batch = global_batch(data.directory, plan.recipe.seed, step, 8)
        optimizer.param_groups[0]["lr"] = training.learning_rate * cosine_with_warmup(step, 2, STEPS)
        targets = batch["labels"][:, 1:].flatten()
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        norms = [
            torch.norm((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(4), p="fro")
            for name, p in trained.items()
            if "lora_A" in name or "lora_B" in name
        ]
        loss = loss + 0.3 * sum(norms) / len(norms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        losses.append(loss.item())
    return losses, config.rank_pattern, {name: values.detach() for name, values in trained.items()}


STAGES = [
    pytest.param("2", id="2"),
    pytest.param("0", id="0", marks=pytest.mark.matrix),
    pytest.param("1", id="1", marks=pytest.mark.matrix),
]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_every_step_and_every_rank_is_that_of_peft(
    two_ranks: Ranks, make_run: MakeRun, model_folder: Path, stage: str
) -> None:
    directory, plan = make_run(*settings(model_folder), f"zero.stage={stage}")
    data = prepare(plan.recipe, progress=False)
    losses, ranks, weights = plain(plan, data)
    call = {"run_directory": str(directory.path), "data": str(data.directory)}
    two_ranks.call("cases:run", **call)
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["loss"] for record in records] == pytest.approx(losses, abs=5e-6)
    newest = folders.complete(directory.checkpoints)[-1]
    state = torch.load(newest / FILE, weights_only=True)
    assert state["ranks"] == ranks
    assert sum(map(sum, ranks.values())) == 2 * 6, "two ranks are left of each of six matrices, on average"
    assert any(sum(left) != 2 for left in ranks.values()), "not the same ones everywhere"
    saved = trained_state_dict(newest, int(stage))
    for name, values in weights.items():
        torch.testing.assert_close(saved[name], values, atol=2e-5, rtol=0)
        if "lora_E" in name:
            left = torch.tensor(ranks[name.removeprefix("base_model.model.")])
            assert (saved[name].flatten()[~left] == 0).all()

    halves, _ = make_run(*settings(model_folder), f"zero.stage={stage}", name="halves")
    call["run_directory"] = str(halves.path)
    two_ranks.call("cases:run", **call, stop_after=6)
    two_ranks.call("cases:run", **call)
    again = [record["loss"] for record in read_json_lines(halves.metrics) if "loss" in record]
    assert again == [record["loss"] for record in records], "importance and ranks came with the checkpoint"


def test_it_is_refused_where_it_is_not_right(make_run: MakeRun, model_folder: Path) -> None:
    own = settings(model_folder)
    with pytest.raises(PlanError, match="cannot be done to weights that ZeRO 3 has partitioned"):
        make_run(*own, "zero.stage=3")
    with pytest.raises(PlanError, match="not proved with an optimizer on the host"):
        make_run(*own, "zero.stage=2", "zero.offload_optimizer=cpu")
    with pytest.raises(PlanError, match=r"initial_steps 3 and final_steps 4 leave none of 7 steps"):
        make_run(*own, "zero.stage=2", "max_steps=7")
    with pytest.raises(RecipeError, match=r"adalora.init_r is 4, and must be more than r, which is 4"):
        make_run(*own, "adapter.r=4")


@pytest.mark.parametrize(
    ("method", "text"),
    [("qlora", "needs the package bitsandbytes"), ("bottleneck", "peft has no bottleneck adapter")],
)
def test_methods_that_are_not_here_say_why(make_run: MakeRun, model_folder: Path, method: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        make_run(*settings(model_folder)[:3], f"adapter={{method: {method}}}")
