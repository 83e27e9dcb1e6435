"""The reference's log-probabilities, computed once by `prepare`: those of the live one, which is not there then."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.data.loader import without_targets
from launcher.data.prepare import prepare
from launcher.errors import RecipeError
from launcher.recipe.loading import load_recipe
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.tasks.kto import _mismatched
from tests.support.ranks import Ranks
from tests.training import test_kto, test_preference
from tests.training.test_preference import other_model

CASES = ["dpo", "ipo", "lora", "kto"]


def make(folder: Path, model_folder: Path, case: str, ahead: bool, *overrides: str) -> Any:
    folder.mkdir(exist_ok=True)
    if case == "kto":
        section = {**test_kto.SECTION, "precompute_reference": ahead}
        return test_kto.make(folder, model_folder, *overrides, kto=section)
    sections: dict[str, Any] = {"preference": {"method": "dpo" if case == "lora" else case, "beta": 0.3}}
    sections["preference"]["precompute_reference"] = ahead
    if case == "lora":
        sections["adapter"] = {"method": "lora"}
    return test_preference.make(folder, model_folder, *overrides, **sections)


def task_and_samples(made: Any, split: str = "train") -> Any:
    _, plan, prepared = made
    (dataset,) = prepared.split(split)
    task = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts)
    return task, [dataset[index] for index in range(6)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_loss_is_that_with_the_live_reference(tmp_path: Path, model_folder: Path, case: str, split: str) -> None:
    live, samples = task_and_samples(make(tmp_path / "live", model_folder, case, False), split)
    made = make(tmp_path / "ahead", model_folder, case, True)
    ahead, known = task_and_samples(made, split)
    if case == "lora":
        model = live.build_model().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    else:
        model = other_model(model_folder)
    filled = [*known, without_targets(known[0])]
    with torch.no_grad():
        mine = ahead.loss(model, ahead.collate(filled))
        if case == "kto":
            rows = made[2].split(split)[0]
            before = [rows[index - 1] for index in range(6)]
            theirs = live.collate(samples)
            for index, (sample, other) in enumerate(zip(samples, before, strict=True)):
                ids = _mismatched(sample, other)["input_ids"].astype("int64")
                assert (known[index]["other_input_ids"] == ids).all()
            theirs |= {k: v for k, v in ahead.collate(known).items() if k.startswith("other_") and "reference" not in k}
            expected = live.loss(model, theirs)
        else:
            expected = live.loss(model, live.collate(samples))
    assert mine.loss_sum.item() / 6 == pytest.approx(expected.loss_sum.item() / 6, abs=1e-6)
    assert int(mine.num_targets) == 6
    assert abs(mine.loss_sum.item()) > 1e-3
    assert ahead._copy is None, "there is no second model"


@pytest.mark.distributed
def test_two_workers_train_without_a_reference(tmp_path: Path, two_ranks: Ranks, model_folder: Path) -> None:
    """Step by step what the live reference gives."""
    losses = {}
    for ahead in (True, False):
        directory, _, prepared = make(
            tmp_path / str(ahead), model_folder, "dpo", ahead, "training.max_steps=6", "training.learning_rate=5.0e-3",
            "training.micro_batch_size=4", "evaluation.max_eval_samples=11",
        )  # fmt: skip
        results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        records = list(read_json_lines(directory.metrics))
        losses[ahead] = [r["loss"] for r in records if "loss" in r] + [results[0]["metrics"]["eval_loss"]]
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)
    assert losses[True][0] != pytest.approx(losses[True][-1], abs=1e-3)


def test_it_is_for_methods_with_a_reference(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="orpo compares with no reference"):
        make(tmp_path, model_folder, "orpo", True)


def test_other_weights_are_another_reference(tmp_path: Path, model_folder: Path) -> None:
    """Told by the content of the files: the folder's name stays."""
    folder = tmp_path / "model"
    model = other_model(model_folder)
    shutil.copytree(model_folder, folder)
    _, _, first = make(tmp_path / "one", folder, "dpo", True)
    model.save_pretrained(folder)
    again = prepare(load_recipe(tmp_path / "one" / "recipe.yaml"), progress=False)
    assert again.fingerprint != first.fingerprint
    assert again.tokenizer_directory == first.tokenizer_directory
    sums = [float(data.split("train")[0][0]["chosen_reference"]) for data in (first, again)]
    assert abs(sums[0] - sums[1]) > 1e-2
