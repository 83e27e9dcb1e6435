"""Distillation: the loss is what NumPy computes, and a student comes nearer to its teacher."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from launcher.checkpoints import folders
from launcher.data import derived
from launcher.data.prepare import prepare
from launcher.errors import ModelError, RecipeError, StorageError
from launcher.recipe.loading import load_recipe
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.tasks.distillation import PROJECTIONS, Distillation, layer_pairs
from launcher.tasks.soft_targets import TokenTargets
from launcher.training.export import export_checkpoint
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

SOURCE = {"type": "text", "files": [f"{STDLIB}/json/*.py"], "sample_by": "paragraph"}
STUDENT = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "max_position_embeddings: 64, vocab_size: %d}"
)


def make_lm(folder: Path, teacher: Path, *overrides: str, vocabulary: int = 320, **section: Any) -> Any:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(
        folder, "causal_lm", f"{{config: {STUDENT % vocabulary}, attn_implementation: eager}}", [SOURCE],
        data={"sequence_length": 32}, tokenizer={"tokenizer_name_or_path": str(teacher)},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 3.0, "weight": 0.7, **section},
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


def by_numpy(student: Any, teacher: Any, labels: Any, temperature: float, weight: float) -> float:
    def log_softmax(values: Any) -> Any:
        shifted = values - values.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    student, teacher = (np.asarray(values, np.float64) for values in (student, teacher))
    own, other = log_softmax(student / temperature), log_softmax(teacher / temperature)
    counted = labels != -100
    soft = ((np.exp(other) * (other - own)).sum(-1) * counted).sum() * temperature**2
    hard = -np.take_along_axis(log_softmax(student), np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return float((1 - weight) * (hard * counted).sum() + weight * soft)


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


def classifier(
    folder: Path, teacher: Path, section: dict[str, Any] | None = None, model_attention: str = "sdpa"
) -> Any:
    rows = [{"text": f"a text about {word} {i}", "label": word} for i in range(20) for word in ("cats", "dogs")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}, attn_implementation: {model_attention}}}",
        [{"type": "jsonl", "files": [str(folder / "rows.jsonl")]}], data={"sequence_length": 32},
        tokenizer={"train": {"vocab_size": 300}},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 2.0, "weight": 0.25, **(section or {})},
    )  # fmt: skip
    return run_of(recipe, folder / "run")


def save_teacher(folder: Path, labels: list[str], heads: int = 2) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    return folder / "teacher"


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


def top_by_numpy(student: Any, teacher: Any, labels: Any, top: int, temperature: float) -> float:
    """The divergence over the most probable tokens and "any other", times the temperature squared."""

    def softmax(values: Any) -> Any:
        values = np.exp((values - values.max(-1, keepdims=True)).astype(np.float64) / temperature)
        return values / values.sum(-1, keepdims=True)

    own, other = softmax(student.numpy()), softmax(teacher.numpy())
    best = np.argsort(-other, axis=-1)[..., :top]
    p, q = np.take_along_axis(other, best, -1), np.take_along_axis(own, best, -1)
    each = (p * np.log(p / q)).sum(-1)
    rest = 1 - p.sum(-1)
    if top < other.shape[-1]:
        each = each + rest * np.log(rest / (1 - q.sum(-1)))
    return float((each * (labels != -100)).sum() * temperature**2)


@pytest.mark.parametrize("top", [1, 8, 320])
def test_the_loss_of_kept_tokens_is_that_of_numpy(tmp_path: Path, model_folder: Path, top: int) -> None:
    """With all tokens it is the live teacher's, with fewer it is smaller by what they cannot tell."""
    _, plan, prepared = make_lm(tmp_path, model_folder, precompute=True, top_k=top, weight=1.0)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    assert prepared.split("validation")[0][0].keys() == {"input_ids", "labels", "position_ids"}
    batch = task.collate([dataset[index] for index in (3, 5, 8)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    labels, targets = batch["labels"].numpy(), task.num_targets(batch)
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(model_folder)
        own, theirs = (asked(**inputs, use_cache=False).logits for asked in (model, teacher))
        mine = task.loss(model, batch).loss_sum.item()
    whole = by_numpy(own, theirs, labels, 3.0, 1.0)
    assert mine / targets == pytest.approx(top_by_numpy(own, theirs, labels, top, 3.0) / targets, abs=1e-5)
    task.loss(model, batch).loss_sum.backward()
    assert all(values.grad.isfinite().all() for values in model.parameters() if values.grad is not None)
    if top == 320:
        assert mine / targets == pytest.approx(whole / targets, abs=1e-5)
        assert prepared.statistics["notes"] == []
    else:
        assert 0 < mine < whole
        assert f"{top} of 320 tokens are kept" in prepared.statistics["notes"][0]


def test_a_classifiers_teacher_is_asked_once(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path, ["cats", "dogs"])
    _, plan, prepared = classifier(tmp_path, teacher, {"precompute": True})
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(6)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(teacher).eval()(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 2.0, 0.25)
        assert task.loss(model, batch).loss_sum.item() / 6 == pytest.approx(expected / 6, abs=1e-5)
    assert task.distillation.teacher is None


def test_asking_goes_on_where_it_was_ended(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after two parts; what is whole is not computed again, and the result is the same."""
    monkeypatch.setattr(derived, "ROWS_PER_PART", 100)
    asked: list[range] = []
    annotate = TokenTargets.annotate

    def counting(self: Any, dataset: Any, rows: range) -> Any:
        if len(asked) == 2:
            asked.append(rows)
            raise KeyboardInterrupt
        asked.append(rows)
        return annotate(self, dataset, rows)

    monkeypatch.setattr(TokenTargets, "annotate", counting)
    with pytest.raises(KeyboardInterrupt):
        make_lm(tmp_path, model_folder, precompute=True, top_k=4)
    prepared = prepare(load_recipe(tmp_path / "recipe.yaml"), progress=False)
    rows = len(prepared.split("train")[0])
    assert sorted(first.start for first in asked) == sorted([200, *range(0, rows, 100)]), "the third part alone twice"
    whole = make_lm(tmp_path / "again", model_folder, precompute=True, top_k=4)[2]
    for index in (0, 99, 100, rows - 1):
        one, other = prepared.split("train")[0][index], whole.split("train")[0][index]
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_there_must_be_room(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lm(tmp_path, model_folder)
    monkeypatch.setattr(derived.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(StorageError, match=r"what the teacher says would take about .* MiB in .* 0.0 MiB are free"):
        prepare(load_recipe(tmp_path / "recipe.yaml", ("distillation.precompute=true",)), progress=False)


@pytest.mark.distributed
def test_training_needs_no_teacher_that_was_asked_before(tmp_path: Path, two_ranks: Ranks, model_folder: Path) -> None:
    """Step by step what the live teacher gives."""
    losses = []
    for precompute in (False, True):
        teacher = tmp_path / "teacher"
        shutil.copytree(model_folder, teacher, dirs_exist_ok=True)
        directory, _, prepared = make_lm(
            tmp_path / str(precompute), teacher, "training.max_steps=4", precompute=precompute, top_k=320
        )
        if precompute:
            shutil.rmtree(teacher)
        two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        losses.append([record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


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
