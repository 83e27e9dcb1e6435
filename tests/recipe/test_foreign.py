"""Recipes out of other tools' files: what is carried over, what is named as left out, and that the result loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.errors import ExpectedError
from launcher.recipe.foreign import Imported, import_file
from launcher.recipe.loading import load_recipe
from launcher.recipe.schema import Recipe

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: chat_template
    field_messages: conversations
    split: train[:10%]
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj]
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_ratio: 0.1
evals_per_epoch: 4
weight_decay: 0.0
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: ipo
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": "auto",
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme", "nvme_path": "/local"},
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": "auto",
    },
    "wall_clock_breakdown": True,
}


def imported(folder: Path, name: str, content: str | dict[str, Any]) -> Imported:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return import_file(file)


def loaded(folder: Path, found: Imported, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(found.yaml())
    return load_recipe(path, overrides)


def test_axolotl(tmp_path: Path) -> None:
    found = imported(tmp_path, "lora-1b.yml", AXOLOTL)
    recipe = loaded(tmp_path, found)
    assert found.open == []
    assert (recipe.name, recipe.task, recipe.data.format) == ("lora-1b", "causal_lm", "chat")
    assert recipe.model.model_name_or_path == "NousResearch/Llama-3.2-1B"
    assert (recipe.model.attn_implementation, recipe.data.packing) == ("sdpa", "first_fit_decreasing")
    alone = imported(tmp_path, "alone.yml", AXOLOTL.replace("micro_batch_size: 2", "micro_batch_size: 1"))
    assert loaded(tmp_path, alone).model.attn_implementation == "flash_attention_2"
    (source,) = recipe.data.sources
    assert (source.type, source.split, source.columns) == ("hub", "train[:10%]", {"messages": "conversations"})
    assert recipe.adapter is not None
    assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (16, 32, 0.05)
    assert recipe.adapter.target_modules == ("gate_proj", "down_proj", "up_proj")
    training = recipe.training
    assert (training.micro_batch_size, training.gradient_accumulation_steps, training.num_train_epochs) == (2, 2, 1)
    assert (training.learning_rate, training.precision, training.warmup_ratio) == (2e-4, "bf16", 0.1)
    assert (recipe.data.validation_fraction, recipe.data.sequence_length) == (0.1, 2048)
    assert recipe.optimizer.adam_beta2 == 0.999, "a recipe's own default is another one"
    unknown = {"loss_watchdog_threshold", "evals_per_epoch"}
    assert set(found.left_out) == {"output_dir", "flash_attention", "optimizer", *unknown}
    assert "# Not carried over: evals_per_epoch: a recipe has no such field\n" in found.yaml()


def test_axolotl_with_quantised_weights_names_them(tmp_path: Path) -> None:
    found = imported(tmp_path, "q.yml", AXOLOTL.replace("adapter: lora", "adapter: qlora\nload_in_4bit: true"))
    assert "adapter" not in found.recipe
    assert "quantised weights are not trained here" in found.left_out["adapter"]
    assert {"lora_r", "load_in_4bit"} <= set(found.left_out)


def test_llama_factory(tmp_path: Path) -> None:
    found = imported(tmp_path, "llama3_dpo.yaml", LLAMA_FACTORY)
    assert found.open == ["data.sources"]
    recipe = loaded(tmp_path, found, "data.sources=[{type: jsonl, files: [pairs.jsonl]}]")
    assert (recipe.task, recipe.preference.method, recipe.preference.beta) == ("preference", "ipo", 0.2)
    assert recipe.adapter is not None
    assert (recipe.adapter.r, recipe.adapter.lora_alpha) == (8, 16)
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert (recipe.training.micro_batch_size, recipe.training.lr_scheduler_type) == (1, "cosine")
    assert recipe.checkpoint.save_steps == 500
    assert {"dataset", "template", "output_dir"} <= set(found.left_out)
    assert "dataset_info.json" in found.left_out["dataset"]


def test_training_arguments_as_transformers_writes_them(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir="out", per_device_train_batch_size=16, learning_rate=2e-5, max_steps=300, warmup_steps=30,
        weight_decay=0.01, use_cpu=True, bf16=False, report_to=[], label_smoothing_factor=0.1, seed=3,
    )  # fmt: skip
    found = imported(tmp_path, "training_args.json", arguments.to_json_string())
    assert found.open == ["model.model_name_or_path", "data.sources", "data.sequence_length"]
    recipe = loaded(
        tmp_path, found, "model={model_name_or_path: gpt2}", "data.sources=[{type: text, files: [a.txt]}]",
        "data.sequence_length=64",
    )  # fmt: skip
    training = recipe.training
    assert (training.micro_batch_size, training.max_steps, training.warmup_steps) == (16, 300, 30)
    assert (training.learning_rate, training.precision, training.lr_scheduler_type) == (2e-5, "fp32", "linear")
    assert (recipe.optimizer.weight_decay, recipe.optimizer.adam_beta2, recipe.seed) == (0.01, 0.999, 3)
    assert set(found.left_out) == {"output_dir", "label_smoothing_factor", "use_cpu"}


def test_deepspeed(tmp_path: Path) -> None:
    found = imported(tmp_path, "ds_z3.json", DEEPSPEED)
    recipe = loaded(
        tmp_path, found, "model={model_name_or_path: gpt2}", "data.sources=[{type: text, files: [a.txt]}]",
        "data.sequence_length=64", "training.max_steps=9",
    )  # fmt: skip
    assert (recipe.zero.stage, recipe.zero.offload_optimizer, recipe.training.precision) == (3, "cpu", "bf16")
    assert (recipe.training.micro_batch_size, recipe.training.max_grad_norm) == (4, 0.5)
    optimizer = recipe.optimizer
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_epsilon) == (0.8, 0.99, 1e-7)
    assert recipe.deepspeed.overrides["zero_optimization"] == {"overlap_comm": True}
    assert recipe.deepspeed.overrides["wall_clock_breakdown"] is True
    assert {"scheduler", "zero_optimization.offload_param"} <= set(found.left_out)


def test_the_command_writes_a_recipe_and_tells_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "lora.yml").write_text(AXOLOTL)
    target = tmp_path / "mine.yaml"
    command = ["import", str(tmp_path / "lora.yml"), "--output", str(target)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert f"Axolotl -> {target}" in outcome.output
    assert "not carried over: loss_watchdog_threshold: a recipe has no such field" in outcome.output
    assert load_recipe(target).training.micro_batch_size == 2
    assert isinstance(CliRunner().invoke(app, command).exception, ExpectedError), "it is not overwritten"


def test_kernels_compilation_and_lion_of_every_tool(tmp_path: Path) -> None:
    liger = "plugins: [axolotl.integrations.liger.LigerPlugin, mine.Plugin]\nliger_rope: true\nliger_rms_norm: true\n"
    found = {
        "axolotl.yml": AXOLOTL.replace("optimizer: adamw_8bit", "optimizer: lion_8bit\ntorch_compile: true") + liger,
        "factory.yaml": LLAMA_FACTORY + "enable_liger_kernel: true\ntorch_compile: true\noptim: lion_32bit\n",
        "arguments.json": {
            "output_dir": "out", "use_liger_kernel": True, "torch_compile": True, "torch_compile_backend": "inductor",
            "optim": "lion_32bit", "num_train_epochs": 1,
        },
    }  # fmt: skip
    rest = (
        "model.model_name_or_path=gpt2", "data.sources=[{type: jsonl, files: [a.jsonl]}]", "data.sequence_length=64",
    )  # fmt: skip
    for name, content in found.items():
        one = imported(tmp_path, name, content)
        recipe = loaded(tmp_path, one, *rest)
        assert (recipe.model.kernels, recipe.training.torch_compile, recipe.optimizer.type) == ("auto", True, "lion")
        assert not {"torch_compile_backend", "use_liger_kernel", "liger_rope", "optim"} & set(one.left_out)
        if name == "axolotl.yml":
            assert one.left_out["optimizer"] == "'lion_8bit': lion with states in fp32 is taken"
            assert "plugins" in one.left_out
    off = imported(tmp_path, "off.yaml", LLAMA_FACTORY + "enable_liger_kernel: false\ntorch_compile: false\n")
    assert "kernels" not in off.recipe["model"]
    assert "torch_compile" not in off.recipe["training"]
    assert not {"enable_liger_kernel", "torch_compile"} & set(off.left_out)


def test_deepspeeds_other_optimizers_and_states_on_nvme(tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/local", "pin_memory": True, "buffer_count": 5},
    }
    content = {**DEEPSPEED, "zero_optimization": zero, "aio": {"block_size": 2097152}}
    found = imported(tmp_path, "ds_nvme.json", content)
    assert found.recipe["zero"] == {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/local"}
    overrides = found.recipe["deepspeed"]["overrides"]
    assert overrides["zero_optimization"] == {"offload_optimizer": {"buffer_count": 5}}
    assert overrides["aio"] == {"block_size": 2097152}
    for name, kind in (("FusedLion", "lion"), ("SGD", "sgd"), ("Muon", "muon")):
        optimizer = {"type": name, "params": {"lr": 3e-5, "momentum": 0.9} if kind != "lion" else {"lr": 3e-5}}
        found = imported(tmp_path, "other.json", {**DEEPSPEED, "optimizer": optimizer})
        assert found.recipe["optimizer"] == {"type": kind, **({} if kind == "lion" else {"momentum": 0.9})}
    found = imported(tmp_path, "none.json", {**DEEPSPEED, "optimizer": {"type": "Lamb", "params": {"lr": 3e-5}}})
    assert "'Lamb'; there are adamw, lion, muon and sgd" in found.left_out["optimizer.type"]


@pytest.mark.parametrize("content", ["{}", "a: 1", "[1, 2]", ": :", "key: [1"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ExpectedError, match=r"is not known for a file of Axolotl|cannot read"):
        imported(tmp_path, "some.yaml", content)
