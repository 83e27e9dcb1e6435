"""Adapters and frozen weights: what is trained, what is saved, what is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launcher.checkpoints import folders
from launcher.errors import ModelError, RecipeError
from launcher.tasks import make_task
from launcher.training.consolidation import trained_state_dict
from launcher.training.export import export_checkpoint
from tests.support.ranks import Ranks
from tests.training.task_runs import STDLIB, run_of, write_recipe

METHODS = ["lora", "rslora", "dora", "adalora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning"]
OWN = {"adalora": {"target_modules": ["q_proj", "v_proj"], "r": 4}}
"""What a method needs besides."""
RATES = {"prompt_tuning": 0.3, "adalora": 0.1}
PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")


def make(folder: Path, model_folder: Path, adapter: dict[str, Any] | None, *overrides: str, **sections: Any) -> Any:
    source = {
        "type": "text",
        "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"],
        "pattern": r"(?P<prompt>def \w+\([^)]*\):\n)\s+(?P<completion>[^\n]{20,})",
    }
    recipe = write_recipe(
        folder,
        "causal_lm",
        f"{{model_name_or_path: {model_folder}}}",
        [source],
        **{
            "data": {"format": "prompt_completion", "sequence_length": 64, "max_bad_fraction": 0.3},
            "adapter": adapter,
            **sections,
        },
    )
    return run_of(recipe, folder / "run", *overrides)


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "stage"), [*((method, 2) for method in METHODS), ("lora", 3)])
def test_only_the_adapter_is_trained_saved_and_exported(
    tmp_path: Path, two_ranks: Ranks, model_folder: Path, method: str, stage: int
) -> None:
    directory, plan, prepared = make(
        tmp_path,
        model_folder,
        {"method": method, "num_virtual_tokens": 4, **OWN.get(method, {})},
        f"zero.stage={stage}",
        "training.max_steps=12",
        f"training.learning_rate={RATES.get(method, 0.02)}",
        "evaluation.eval_steps=1",
    )
    call = {"run_directory": str(directory.path), "data": str(prepared.directory)}
    two_ranks.call("cases:run", **call, stop_after=6)
    before = losses(directory)[0]
    results = two_ranks.call("cases:run", **call)
    assert results[0]["step"] == 12, "it goes on from the adapter's checkpoint"
    assert results[0]["metrics"]["eval_loss"] < before - 0.01
    newest = folders.complete(directory.checkpoints)[-1]
    saved = trained_state_dict(newest, stage)
    task = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts)
    model = task.build_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(saved) == trained
    assert 0 < sum(values.numel() for values in saved.values()) < 0.25 * sum(p.numel() for p in model.parameters())
    held = [torch.load(path, weights_only=False)["module"] for path in newest.glob("*model_states.pt")]
    assert all(set(part) <= trained for part in held), "no frozen weight is in the files"

    export_checkpoint(newest, plan, prepared.tokenizer_directory, directory.export)
    check_it_is_gone_on_from(directory, plan, prepared, saved)
    adapter = directory.export if method in PROMPTS else directory.export / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    (dataset,) = prepared.split("validation")
    batch = task.collate([dataset[index] for index in range(min(8, len(dataset)))])
    with torch.no_grad():
        mine = task.loss(loaded, batch).loss_sum.item()
        model.load_state_dict(saved, strict=False)
        assert mine == pytest.approx(task.loss(model.eval(), batch).loss_sum.item(), rel=1e-5)
        if method not in PROMPTS:
            merged = AutoModelForCausalLM.from_pretrained(directory.export).eval()
            assert task.loss(merged, batch).loss_sum.item() == pytest.approx(mine, rel=1e-5)


def check_it_is_gone_on_from(directory: Any, plan: Any, prepared: Any, saved: dict[str, torch.Tensor]) -> None:
    """Another run may begin with the exported adapter, bit by bit; not with one of another shape."""
    section = plan.recipe.adapter
    if section.method == "adalora" or section.method in PROMPTS:
        return
    folder = directory.export / "adapter"

    def built(**changes: Any) -> Any:
        update = {"adapter_name_or_path": str(folder), **changes}
        recipe = plan.recipe.model_copy(update={"adapter": section.model_copy(update=update)})
        return make_task(plan.model_copy(update={"zero_stage": 0, "recipe": recipe}), prepared.facts).build_model()

    trained = {name: values for name, values in built().named_parameters() if values.requires_grad}
    assert all(torch.equal(values, saved[name]) for name, values in trained.items())
    with pytest.raises(ModelError, match="is another one: target_modules"):
        built(target_modules=("o_proj",))


def losses(directory: Any) -> list[float]:
    from launcher.run_directory import read_json_lines

    return [record["eval_loss"] for record in read_json_lines(directory.metrics) if "eval_loss" in record]


def test_adapters_do_what_peft_does(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make(tmp_path, model_folder, {"method": "rslora", "r": 4, "lora_alpha": 8})
    model = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts).build_model()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)
    again = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts).build_model()
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.requires_grad == ("lora_" in name)


def test_targets_that_match_nothing_are_named_with_near_ones(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make(tmp_path, model_folder, {"method": "lora", "target_modules": ["q_porj"]})
    with pytest.raises(ModelError, match=r"no module's name ends with 'q_porj'; did you mean q_proj\?"):
        make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts).build_model()


def test_prompts_are_not_for_packed_rows(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="puts one prompt before each row"):
        make(tmp_path, model_folder, {"method": "prompt_tuning"}, data={"sequence_length": 32})


def test_freezing_by_pattern(tmp_path: Path, model_folder: Path) -> None:
    def trained(*overrides: str) -> set[str]:
        _, plan, prepared = make(tmp_path, model_folder, None, *overrides)
        model = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts).build_model()
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained('model.freeze=["*"]', 'model.unfreeze=["lm_head.*"]') == {"lm_head.weight"}
    upper = trained('model.freeze=["*.embed_tokens.*", "*.layers.0.*"]')
    assert not any(".layers.0." in name or "embed" in name for name in upper)
    assert any(".layers.1." in name for name in upper)
    with pytest.raises(ModelError, match=r"no parameter matches '\*\.layer\.0\.\*'"):
        trained('model.freeze=["*.layer.0.*"]')
    with pytest.raises(ModelError, match="leaves no parameter to train"):
        trained('model.freeze=["*"]')
