"""Distillation: the loss is what NumPy computes, and a student comes nearer to its teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from launcher.checkpoints import folders
from launcher.errors import ModelError, RecipeError
from launcher.recipe.loading import load_recipe
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.tasks.distillation import PROJECTIONS, Distillation, layer_pairs
from launcher.training.export import export_checkpoint
from tests.support.ranks import Ranks
from tests.training.distillation_runs import by_numpy, classifier, make_lm, save_teacher
from tests.training.task_runs import run_of, write_recipe


def test_the_loss_of_a_language_model_is_that_of_numpy(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make_lm(tmp_path, model_folder)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model_folder)(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 3.0, 0.7)
        output = task.loss(model, batch)
    assert output.loss_sum.item() / task.num_targets(batch) == pytest.approx(
        expected / task.num_targets(batch), abs=1e-5
    )
    model.eval()
    with torch.no_grad():
        plain = task.loss(model, batch).loss_sum.item()
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 3.0, 0.0)
    assert plain == pytest.approx(expected, rel=1e-5), "an evaluation does not ask the teacher"


def test_the_loss_of_a_classifier_is_that_of_numpy(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path, ["cats", "dogs"])
    _, plan, prepared = classifier(tmp_path, teacher)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(6)])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(teacher).eval()(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 2.0, 0.25)
        assert task.loss(model, batch).loss_sum.item() / 6 == pytest.approx(expected / 6, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "text"),
    [(["dogs", "cats"], "the teacher's classes are dogs, cats"), (["a", "b", "c"], "has 3 classes, the student 2")],
)
def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, labels: list[str], text: str) -> None:
    _, plan, prepared = classifier(tmp_path, save_teacher(tmp_path, labels))
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    with pytest.raises(ModelError, match=text):
        task.loss(task.build_model().train(), task.collate([dataset[0]]))


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make_lm(tmp_path, model_folder, vocabulary=333)
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    with pytest.raises(ModelError, match="has 320 tokens, the student 333"):
        task.loss(task.build_model().train(), task.collate([dataset[0]]))


@pytest.mark.distributed
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, two_ranks: Ranks, model_folder: Path) -> None:
    directory, _, prepared = make_lm(
        tmp_path, model_folder, "training.max_steps=40", "distillation.weight=1.0", "training.micro_batch_size=8",
        "training.learning_rate=1.0e-2",
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    losses = [record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


LAYERS = {"hidden_weight": 0.4, "attention_weight": 0.6}


def layers_by_numpy(student: Any, teacher: Any, matrix: Any, pairs: Sequence[tuple[int, int]], weights: Any) -> float:
    """Both losses of `LAYERS`, summed over positions, in float64."""

    def numpy(values: Any) -> Any:
        return values.detach().numpy().astype(np.float64)

    total = 0.0
    for mine, other in pairs:
        own, theirs = numpy(student.hidden_states[mine]), numpy(teacher.hidden_states[other])
        own = own if matrix is None else own @ numpy(matrix[f"layer_{mine}"].weight).T
        total += 0.4 * (((own - theirs) ** 2).mean(-1) * weights).sum() / len(pairs)
        own, theirs = numpy(student.attentions[mine - 1]), numpy(teacher.attentions[other - 1])
        if own.shape[1] != theirs.shape[1]:
            own, theirs = own.mean(1, keepdims=True), theirs.mean(1, keepdims=True)
        total += 0.6 * (((own - theirs) ** 2).sum(-1).mean(1) * weights).sum() / len(pairs)
    return total


def test_the_losses_of_layers_are_those_of_numpy(tmp_path: Path, model_folder: Path) -> None:
    """One narrow layer with two heads learns from the second of two wider ones with four."""
    _, plan, prepared = make_lm(tmp_path, model_folder, **LAYERS)
    task = make_task(plan, prepared.facts)
    model: Any = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
    teacher = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    labels = batch["labels"].numpy()
    output = task.loss(model, batch)
    with torch.no_grad():
        own, theirs = model(**asked), teacher(**asked)
        expected = by_numpy(own.logits, theirs.logits, labels, 3.0, 0.7)
    matrices = getattr(model, PROJECTIONS)
    expected += layers_by_numpy(own, theirs, matrices, [(1, 2)], labels != -100)
    targets = task.num_targets(batch)
    assert output.loss_sum.item() / targets == pytest.approx(expected / targets, abs=1e-5)
    output.loss_sum.backward()
    assert all(matrix.weight.grad.abs().sum() > 0 for matrix in matrices.values()), "the projection learns too"


def test_the_losses_of_a_classifiers_layers_are_those_of_numpy(tmp_path: Path) -> None:
    """Each sample's positions count together as one target; padding does not."""
    teacher = save_teacher(tmp_path, ["cats", "dogs"], heads=4)
    _, plan, prepared = classifier(tmp_path, teacher, {**LAYERS, "layers": [0, 1]}, model_attention="eager")
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in (0, 9, 30)])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(teacher, attn_implementation="eager").eval()(**asked)
        own = model(**asked)
        expected = by_numpy(own.logits, theirs.logits, batch["labels"].numpy(), 2.0, 0.25)
        mask = batch["attention_mask"].numpy()
        matrices = getattr(model, PROJECTIONS)
        assert set(matrices) == {"layer_2"}
        expected += layers_by_numpy(own, theirs, matrices, [(2, 1)], mask / mask.sum(1, keepdims=True))
        assert task.loss(model, batch).loss_sum.item() / 3 == pytest.approx(expected / 3, abs=1e-5)


def test_layers_are_spread_evenly_or_named(tmp_path: Path, model_folder: Path) -> None:
    section = make_lm(tmp_path, model_folder, hidden_weight=1.0)[1].recipe.distillation
    assert layer_pairs(section, 3, 12) == [(1, 4), (2, 8), (3, 12)]
    named = section.model_copy(update={"layers": (2, 0, 5)})
    assert layer_pairs(named, 3, 6) == [(1, 2), (3, 5)]
    with pytest.raises(ModelError, match=r"layers 1 to 4, or 0, for each of the student's 3; it has \[2, 0, 5\]"):
        layer_pairs(named, 3, 4)


@pytest.mark.parametrize(
    ("section", "overrides", "text"),
    [
        ({"hidden_weight": 1.0, "precompute": True}, (), "need the teacher while training"),
        ({"attention_weight": 1.0}, ("model.attn_implementation=sdpa",), "only eager attention tells"),
        ({"precompute": True, "zero_stage": 3}, (), "asks a teacher that is whole"),
        ({"hidden_weight": 1.0}, ("adapter={method: lora}",), "a student that is trained whole"),
        ({"layers": [1]}, (), "layers is for hidden_weight and attention_weight"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, model_folder: Path, section: dict[str, Any], overrides: tuple[str, ...], text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        make_lm(tmp_path, model_folder, *overrides, **section)


SPREAD = [
    pytest.param("2", "fp32", 1e-5, id="2"),
    pytest.param("3", "fp32", 1e-5, id="3"),
    pytest.param("2", "bf16", 2e-2, id="bf16", marks=pytest.mark.matrix),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "dtype", "tolerance"), SPREAD)
def test_a_spread_teacher_says_what_a_whole_one_does(
    tmp_path: Path, two_ranks: Ranks, model_folder: Path, stage: str, dtype: str, tolerance: float
) -> None:
    """Of layers too, with projections; the run goes on from a checkpoint, and the export is the student alone."""
    losses = []
    for teacher_stage in (0, 3):
        directory, plan, prepared = make_lm(
            tmp_path / str(teacher_stage), model_folder, "training.max_steps=6", f"zero.stage={stage}",
            "optimizer.type=sgd", "training.learning_rate=0.05", zero_stage=teacher_stage,
            dtype=dtype if teacher_stage else "fp32", **LAYERS,
        )  # fmt: skip
        call = {"run_directory": str(directory.path), "data": str(prepared.directory)}
        two_ranks.call("cases:run", **call, stop_after=2)
        two_ranks.call("cases:run", **call)
        losses.append([record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    newest = folders.complete(directory.checkpoints)[-1]
    target = export_checkpoint(newest, plan, prepared.tokenizer_directory, tmp_path / "export")
    _, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_student_gives_no_more_than_is_asked(tmp_path: Path, model_folder: Path) -> None:
    _, plan, _ = make_lm(tmp_path, model_folder)
    section = plan.recipe.distillation
    wanted = {
        ("hidden_weight",): {"output_hidden_states": True},
        ("attention_weight",): {"output_attentions": True},
        (): {},
    }
    for names, expected in wanted.items():
        made = section.model_copy(update=dict.fromkeys(names, 1.0))
        assert Distillation(plan, made, AutoModelForCausalLM).wanted == expected


def test_the_loss_of_pictures_is_that_of_numpy(tmp_path: Path) -> None:
    """The teacher sees what the student does, in its own number format."""
    sections = {"name": "digits", "type": "sklearn"}
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, id2label={i: str(i) for i in range(10)},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    student = "{model_type: vit, hidden_size: 24, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    student += "image_size: 8, patch_size: 4, num_channels: 1, hidden_dropout_prob: 0.0}"
    recipe = write_recipe(
        tmp_path, "image_classification", f"{{config: {student}}}", [sections],
        distillation={"teacher_name_or_path": str(tmp_path / "teacher"), "temperature": 2.0, "weight": 0.3},
    )  # fmt: skip
    _, plan, prepared = run_of(recipe, tmp_path / "run")
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(6)])
    pixels = (batch["pixels"].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        theirs = ViTForImageClassification.from_pretrained(tmp_path / "teacher").eval()(pixel_values=pixels).logits
        expected = by_numpy(model(pixel_values=pixels).logits, theirs, batch["labels"].numpy(), 2.0, 0.3)
        assert task.loss(model, batch).loss_sum.item() / 6 == pytest.approx(expected / 6, abs=1e-5)
    with pytest.raises(RecipeError, match="are for texts: pictures are changed while training"):
        load_recipe(recipe, ("distillation.precompute=true",))
