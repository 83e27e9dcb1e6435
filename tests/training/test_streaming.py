"""Pretrained weights under ZeRO 3: every rank reads its own part, and nobody holds the model whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from tests.support.loading_cases import digest
from tests.support.ranks import Ranks
from tests.support.small_models import small


def plan_of(folder: Path, model: Path, *overrides: str) -> Path:
    """The plan of a recipe that fine-tunes the model under ZeRO 3 on two workers."""
    (folder / "recipe.yaml").write_text(
        f"""
name: streamed
model: {{model_name_or_path: {model}}}
data: {{sources: [{{type: text, files: ["*.txt"]}}], sequence_length: 8}}
training: {{max_steps: 1, micro_batch_size: 1, precision: fp32}}
zero: {{stage: 3}}
"""
    )
    plan = make_plan(load_recipe(folder / "recipe.yaml", overrides), Resources(nodes=1, workers_per_node=2))
    path = folder / "plan.json"
    path.write_text(plan.model_dump_json())
    return path


def save(folder: Path, auto_class: str, config: dict[str, Any], **options: Any) -> Path:
    torch.manual_seed(11)
    fields = dict(config)
    made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    getattr(transformers, auto_class).from_config(made).save_pretrained(folder, **options)
    return folder


def expected(model: Path, auto_class: str, dtype: torch.dtype) -> tuple[dict[str, str], set[str]]:
    """Digests of the model as transformers loads it alone, and the names of what is not in its files."""
    whole, info = getattr(transformers, auto_class).from_pretrained(model, dtype=dtype, output_loading_info=True)
    return {name: digest(value) for name, value in whole.state_dict().items()}, set(info["missing_keys"])


BERT = {"model_type": "bert", "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 301}  # fmt: skip
RESNET = {"model_type": "resnet", "num_channels": 1, "embedding_size": 6, "hidden_sizes": [6, 10], "depths": [1, 1]}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("saved_as", "loaded_as", "config", "precision"),
    [
        pytest.param("AutoModelForCausalLM", "AutoModelForCausalLM", small("llama"), "fp32", id="many files"),
        pytest.param("AutoModelForCausalLM", "AutoModelForCausalLM", small("gpt2"), "bf16", id="tied, other precision"),
        pytest.param("AutoModelForCausalLM", "AutoModelForCausalLM", small("qwen3_moe"), "fp32", id="made of experts"),
        pytest.param("AutoModel", "AutoModelForSequenceClassification", BERT, "fp32", id="new head, other prefix"),
        pytest.param(
            "AutoModelForImageClassification", "AutoModelForImageClassification", RESNET, "fp32", id="buffers"
        ),
    ],
)
def test_streamed_weights_are_those_of_the_files(
    tmp_path: Path, two_ranks: Ranks, saved_as: str, loaded_as: str, config: dict[str, Any], precision: str
) -> None:
    model = save(tmp_path / "model", saved_as, config, max_shard_size="100KB")
    wanted, missing = expected(model, loaded_as, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    plan = plan_of(tmp_path, model, f"training.precision={precision}")
    loaded = two_ranks.call("loading_cases:load", plan=str(plan), auto_class=loaded_as)
    for rank in loaded:
        assert rank["partitioned"]
        assert set(rank["digests"]) == set(wanted)
        assert {name for name, found in rank["digests"].items() if found != wanted[name]} <= missing
    assert loaded[0]["digests"] == loaded[1]["digests"]


@pytest.mark.distributed
def test_weights_of_another_shape_are_refused(tmp_path: Path, two_ranks: Ranks) -> None:
    model = save(tmp_path / "model", "AutoModelForSequenceClassification", {**BERT, "num_labels": 3})
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 60}))
    with pytest.raises(AssertionError, match="ModelError: transformers cannot build the model"):
        two_ranks.call(
            "loading_cases:load", plan=str(plan_of(tmp_path, model)), auto_class="AutoModelForSequenceClassification"
        )


@pytest.mark.distributed
@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "random"])
def test_a_stage_of_a_pipeline_is_built_without_the_others(tmp_path: Path, two_ranks: Ranks, pretrained: bool) -> None:
    config = small("llama", num_hidden_layers=12)
    model = save(tmp_path / "model", "AutoModelForCausalLM", config)
    overrides = ["parallel.pipeline_parallel_size=2", "zero.stage=1"]
    if not pretrained:
        source = ("model.model_name_or_path=null", f"model.config={model / 'config.json'}")
        overrides += [*source, "tokenizer.train={vocab_size: 1000}"]
    plan = plan_of(tmp_path, model, *overrides)
    ranks = two_ranks.call("loading_cases:memory_of_a_build", plan=str(plan))
    whole = 4 * json.loads(plan.read_text())["model"]["num_parameters"]
    assert sum(rank["own"] for rank in ranks) == whole
    for rank in ranks:
        assert rank["peak"] < 1.25 * rank["own"] < 0.75 * whole
