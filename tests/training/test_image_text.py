"""Pictures and texts: the loss over ranks is that of one process with all pairs, and pictures find their texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import CLIPModel

from launcher.checkpoints import folders
from launcher.data.prepare import prepare
from launcher.errors import RecipeError, SourceError
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from launcher.tasks import make_task
from launcher.training.export import export_checkpoint
from launcher.training.offline import load_checkpoint
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, run_of, write_recipe

CLIP = (
    "{model_type: clip, projection_dim: 16, "
    "text_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4, "
    "max_position_embeddings: 16}, vision_config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 4, image_size: 16, patch_size: 8, num_channels: 1}}"
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files with a text of its own each, and a table of both."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    rows = []
    for index in range(60):
        path = folder / f"{index}.png"
        Image.fromarray((digits.images[index] * 15).astype("uint8")).save(path)
        rows.append({"picture": str(path), "caption": f"{index}: {WORDS[digits.target[index]]}"})
    features = Features({"picture": Picture(), "caption": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


def make(folder: Path, captions: Path, *overrides: str, workers: int = 2, model: str = CLIP, **sections: Any) -> Any:
    source = {"type": "saved", "path": str(captions), "columns": {"image": "picture", "text": "caption"}}
    recipe = write_recipe(
        folder, "image_text_contrastive", f"{{config: {model}}}", [source],
        **{"data": {"sequence_length": 12}, "tokenizer": {"train": {"vocab_size": 280}}, "image": {"size": 16},
           **sections},
    )  # fmt: skip
    return run_of(recipe, folder / f"run-{workers}", *overrides, workers=workers)


def test_the_loss_is_that_of_transformers(tmp_path: Path, captions: Path) -> None:
    _, plan, prepared = make(tmp_path, captions, workers=1)
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(7)])
    pixels = (batch["pixels"].float() / 255 - 0.5) / 0.5
    expected = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels, return_loss=True
    )
    output = task.loss(model, batch)
    assert output.loss_sum.item() / 7 == pytest.approx(expected.loss.item(), abs=1e-5)
    own = torch.autograd.grad(output.loss_sum / 7, model.logit_scale, retain_graph=True)[0]
    assert own.item() == pytest.approx(torch.autograd.grad(expected.loss, model.logit_scale)[0].item(), abs=1e-5)
    ends = (batch["input_ids"] == prepared.facts["end_token_id"]).sum(dim=1)
    assert ends.tolist() == [1] * 7, "where the text encoder looks"


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_workers_learn_what_one_process_with_all_pairs_does(
    tmp_path: Path, one_rank: Ranks, two_ranks: Ranks, captions: Path, stage: str
) -> None:
    """Losses and gradient norms, so the gradients through the other rank's pairs are there, and the temperature's."""
    found = []
    for ranks, workers, micro in ((one_rank, 1, 8), (two_ranks, 2, 4)):
        directory, plan, prepared = make(
            tmp_path, captions, "training.max_steps=4", f"training.micro_batch_size={micro}", f"zero.stage={stage}",
            "training.learning_rate=1.0e-2", workers=workers,
        )  # fmt: skip
        ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        records = [record for record in read_json_lines(directory.metrics) if "grad_norm" in record]
        found.append([value for record in records for value in (record["loss"], record["grad_norm"])])
    assert len(found[0]) == 8
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] == pytest.approx(np.log(8), abs=0.5), "about chance among the whole global batch"
    newest = folders.complete(directory.checkpoints)[-1]
    export_checkpoint(newest, plan, prepared.tokenizer_directory, tmp_path / "export")
    exported = CLIPModel.from_pretrained(tmp_path / "export").eval()
    assert exported.logit_scale.shape == ()
    _, task, model = load_checkpoint(newest, plan, prepared)
    assert exported.logit_scale.item() == model.logit_scale.item() != exported.config.logit_scale_init_value
    (dataset,) = prepared.split("validation")
    batch = task.collate([dataset[index] for index in range(4)])
    with torch.no_grad():
        assert task.loss(exported, batch).loss_sum.item() == pytest.approx(task.loss(model, batch).loss_sum.item())


def test_pairs_that_cannot_be_used_are_counted(tmp_path: Path, captions: Path) -> None:
    rows = [{"image": {"bytes": None, "path": str(path)}, "text": "a digit"} for path in captions.parent.glob("1*.png")]
    bad = [{**rows[0], "text": " "}, {"image": {"bytes": None, "path": "/nothing.png"}, "text": "nothing"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + bad))
    with pytest.raises(SourceError, match=r"2 of 13 examples cannot be used") as error:
        make(tmp_path, captions, data={"sequence_length": 12, "sources": [{"type": "jsonl", "files": [str(file)]}]})
    assert "its text is empty" in str(error.value)
    assert "the image cannot be read" in str(error.value)


def test_a_model_without_two_encoders_is_refused(tmp_path: Path, captions: Path) -> None:
    _, plan, prepared = make(tmp_path, captions, model=BERT, workers=1)
    with pytest.raises(RecipeError, match="BertModel is no dual encoder"):
        make_task(plan, prepared.facts).build_model()


@pytest.mark.distributed
def test_the_shipped_recipe_finds_numerals(tmp_path: Path, two_ranks: Ranks) -> None:
    overrides = ("training.max_steps=80", "evaluation.eval_steps=80", "export.at_end=false")
    recipe = load_recipe("finetune/image-text", (*overrides, f"data.cache_directory={tmp_path}/cache"))
    prepared = prepare(recipe, progress=False)
    plan = make_plan(recipe, Resources(nodes=1, workers_per_node=2))
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, plan)
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert results[0]["metrics"]["eval_image_to_text_recall_at_1"] > 0.4, "chance is about 0.1"
