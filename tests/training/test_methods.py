"""Ways of training: adversarial, and with a learning rate for each layer; against plain PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import RecipeError
from launcher.recipe.training_sections import AdversarialSection
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.training.adversarial import adversarial_loss
from launcher.training.engine import layered_groups
from tests.support.equality import STEPS, Equality, RanksOf
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

SOURCE = {
    "type": "text", "files": [f"{STDLIB}/asyncio/*.py", f"{STDLIB}/email/*.py"], "sample_by": "paragraph",
    "label_from_folder": True,
}  # fmt: skip


def make(folder: Path, *overrides: str, **sections: Any) -> Any:
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}}}", [SOURCE],
        **{"data": {"sequence_length": 32}, "tokenizer": {"train": {"vocab_size": 400}}, **sections},
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


def case(folder: Path) -> Any:
    _, plan, prepared = make(folder)
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    return task, task.build_model().train(), task.collate([dataset[index] for index in range(6)])


def by_hand(model: Any, batch: dict[str, torch.Tensor], moves: list[float], epsilon: float) -> torch.Tensor:
    """Loss on disturbed word embeddings: the sums are made by hand, through `inputs_embeds`."""
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    rest = {name: batch[name] for name in ("attention_mask", "token_type_ids", "labels")}
    disturbance = torch.zeros_like(embeddings)
    for length in moves:
        disturbance.requires_grad_()
        loss = model(inputs_embeds=embeddings + disturbance, **rest).loss
        (gradient,) = torch.autograd.grad(loss, disturbance)
        with torch.no_grad():
            for index in range(len(gradient)):
                one = disturbance[index] + length * gradient[index] / gradient[index].norm()
                disturbance[index] = one * min(1.0, epsilon / float(one.norm()))
    return model(inputs_embeds=embeddings + disturbance.detach(), **rest).loss


@pytest.mark.parametrize(("method", "moves"), [("fgm", [0.5]), ("pgd", [0.25, 0.25, 0.25])])
def test_the_disturbed_loss_is_that_made_by_hand(tmp_path: Path, method: str, moves: list[float]) -> None:
    task, model, batch = case(tmp_path)
    section = AdversarialSection(method=method, epsilon=0.5, steps=3)
    output = adversarial_loss(task.loss, section)(model, batch)
    clean = task.loss(model, batch).loss_sum / 6
    expected = clean + by_hand(model, batch, moves, 0.5)
    assert (output.loss_sum / 6).item() == pytest.approx(expected.item(), abs=1e-5)
    assert output.loss_sum.item() / 12 > clean.item(), "the disturbance makes it harder"
    output.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not model.get_input_embeddings()._forward_hooks
    model.eval()
    with torch.no_grad():
        assert adversarial_loss(task.loss, section)(model, batch).loss_sum.item() / 6 == pytest.approx(clean.item())


def test_each_layer_has_its_learning_rate(tmp_path: Path) -> None:
    _, model, _ = case(tmp_path)
    rates = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layered_groups(model, 0.1, learning_rate=1.0, decay=0.5)
    for group in groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert set(rates) == set(names.values())
    assert rates["classifier.weight"] == rates["bert.pooler.dense.bias"] == 1.0
    assert rates["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert rates["bert.encoder.layer.0.attention.self.query.bias"] == 0.25
    assert rates["bert.embeddings.word_embeddings.weight"] == rates["bert.embeddings.LayerNorm.weight"] == 0.125
    assert groups[0]["lr"] == 1.0, "the rate that is logged"


@pytest.mark.distributed
def test_two_workers_train_with_both(tmp_path: Path, two_ranks: Ranks) -> None:
    directory, _, prepared = make(
        tmp_path, "training.max_steps=200", "training.micro_batch_size=16", "optimizer.layer_wise_lr_decay=0.9",
        training={"adversarial": {"method": "fgm", "epsilon": 0.3}},
    )  # fmt: skip
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    metrics = results[0]["metrics"]
    assert metrics["eval_accuracy"] > metrics["eval_majority_accuracy"] + 0.05
    first = next(record for record in read_json_lines(directory.metrics) if "loss" in record)
    assert first["loss"] > 1.2, "two losses of about log 2"


def test_adversarial_training_is_refused_where_it_is_not_proved(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ZeRO stages 0 to 2"):
        make(tmp_path, "zero.stage=3", training={"adversarial": {"method": "fgm"}})


STAGES = [("zero.stage=2", "zero.offload_optimizer=cpu"), ("zero.stage=3",), ("zero.stage=0",), ("zero.stage=1",)]


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES, ids=["2-offload", "3", "0", "1"])
def test_layers_join_from_the_top_and_are_pulled_to_their_start(
    stage: tuple[str, ...], ranks_of: RanksOf, equality: Equality
) -> None:
    """Every loss and norm is that of a plain process that does so by hand; stopped in the middle and resumed too."""
    ranks, model = ranks_of(2), equality.model()
    settings = ("optimizer.unfreeze_every_steps=4", "optimizer.decay_to_start=20.0", "save_steps=100", *stage)
    directory, plan, _ = equality.run(ranks, model, *settings, stop_after=9)
    data, plain = equality.reference(model, plan)
    ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=2e-6, rel=0)
    assert [record["grad_norm"] for record in records] == pytest.approx(plain.grad_norms, rel=1e-5, abs=0)
    _, without = equality.reference(model, _plan_without(plan))
    assert max(abs(a - b) for a, b in zip(plain.losses, without.losses, strict=True)) > 1e-3, "they change something"


def _plan_without(plan: Any) -> Any:
    section = plan.recipe.optimizer.model_copy(update={"decay_to_start": 0.0})
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"optimizer": section})})
