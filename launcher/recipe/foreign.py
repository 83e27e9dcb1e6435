"""Recipes out of other tools' files: Axolotl, LLaMA-Factory, `TrainingArguments` and DeepSpeed.

What a file says is carried over where a recipe says the same; everything else is named, with the reason where there is
one. The keys are those of Axolotl 0.10, LLaMA-Factory 0.9, transformers 5 and DeepSpeed 0.19.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from launcher.errors import ExpectedError
from launcher.recipe.imported import (
    AXOLOTL,
    DEEPSPEED,
    LLAMA_FACTORY,
    TRAINING,
    TRAINING_ARGUMENTS,
    Imported,
    carry,
    name_the_rest,
    positive,
    put_optimizer,
    put_precision,
    same,
)

FILES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


_DEFAULTS = {"adam_beta2": 0.999, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "num_train_epochs": 3.0,
             "per_device_train_batch_size": 8}  # fmt: skip
"""What transformers takes where a file does not say, and a recipe would take something else."""

_IGNORED: dict[str, Any] = {
    "average_tokens_across_devices": True,
    "dataloader_in_order": True,
    "dataloader_pin_memory": True,
    "ddp_timeout": 1800,
    "eval_do_concat_batches": True,
    "hub_strategy": "every_save",
    "hub_token": "<HUB_TOKEN>",
    "length_column_name": "length",
    "local_rank": -1,
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "logging_strategy": "steps",
    "per_device_eval_batch_size": 8,
    "project": "huggingface",
    "remove_unused_columns": True,
    "save_strategy": "steps",
    "skip_memory_metrics": True,
    "torch_compile_backend": "inductor",
    "train_sampling_strategy": "random",
}
"""What transformers writes for settings that nobody changed, and that are neither empty nor false."""

_ELSEWHERE = {
    "output_dir": "the run directory is named on the command line: zerofleet run --run-dir",
    "report_to": "TensorBoard and metrics.jsonl are always written",
    "deepspeed": "import that file by itself, or name it in deepspeed.config",
    "logging_dir": "TensorBoard files are in the run directory",
}


def import_file(path: Path) -> Imported:
    """Read another tool's file; which tool's is told by its keys.

    Raises:
        ExpectedError: it cannot be read, or is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else YAML(typ="safe").load(text)
    except (OSError, ValueError, YAMLError) as error:
        raise ExpectedError(f"cannot read {path}: {str(error).strip().splitlines()[0]}") from error
    keys = set(content) if isinstance(content, dict) else set()
    found: Imported | None = None
    if keys & {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"}:
        found = from_deepspeed(content)
    elif "base_model" in keys:
        found = from_axolotl(content)
    elif keys & {"stage", "finetuning_type", "cutoff_len"}:
        found = from_llama_factory(content)
    elif keys & {"per_device_train_batch_size", "output_dir"}:
        found = from_training_arguments(content)
    if found is None:
        raise ExpectedError(
            f"{path} is not known for a file of Axolotl (base_model), LLaMA-Factory (stage, finetuning_type), "
            "TrainingArguments (per_device_train_batch_size) or DeepSpeed (zero_optimization)"
        )
    found.recipe = {"name": path.stem.replace(" ", "-"), **found.recipe}
    sections = found.recipe
    missing = {
        "model.model_name_or_path": "model" in sections,
        "data.sources": "sources" in sections.get("data", {}),
        "data.sequence_length": "sequence_length" in sections.get("data", {}),
        "training.max_steps or training.num_train_epochs": bool(
            {"max_steps", "num_train_epochs"} & set(sections.get("training", {}))
        ),
    }
    found.open += [name for name, there in missing.items() if not there]
    return found


def from_training_arguments(content: Mapping[str, Any]) -> Imported:
    """From `TrainingArguments.to_json_string()`."""
    found, rest = Imported("transformers' TrainingArguments"), {**_DEFAULTS, **content}
    for key in ("accelerator_config", "disable_tqdm"):  # written whatever was asked for
        rest.pop(key, None)
    if not rest.get("fsdp"):
        rest.pop("fsdp_config", None)
    if positive(rest.get("max_steps")):
        rest.pop("num_train_epochs", None)  # which max_steps overrides
    if positive(rest.get("warmup_steps")):
        rest.pop("warmup_ratio", None)
    carry(found, rest, TRAINING_ARGUMENTS)
    put_precision(found, rest)
    put_optimizer(found, rest, "optim")
    name_the_rest(found, {key: value for key, value in rest.items() if _IGNORED.get(key, same) != value}, _ELSEWHERE)
    return found


def from_axolotl(content: Mapping[str, Any]) -> Imported:
    """From an Axolotl YAML."""
    found, rest = Imported("Axolotl"), {"adam_beta2": 0.999, "lr_scheduler": "cosine", **content}
    kind = rest.pop("rl", None)
    if kind in ("dpo", "ipo", "orpo", "simpo"):
        found.recipe |= {"task": "preference", "preference": {"method": kind}}
    elif kind == "kto":
        found.put("task", "kto")
    elif kind:
        found.left_out["rl"] = f"{kind!r} is no kind of training here"
    adapter = rest.pop("adapter", None)
    if adapter == "lora":
        found.put("adapter.method", "rslora" if rest.pop("peft_use_rslora", False) else "lora")
    else:
        for key in [key for key in rest if key.startswith("lora_")]:
            found.left_out[key] = f"adapter is {adapter!r}"
            rest.pop(key)
        if adapter:
            found.left_out["adapter"] = f"{adapter!r}: quantised weights are not trained here; lora is"
    _axolotl_kernels(found, rest)
    packing = rest.pop("sample_packing", None)
    chats = _axolotl_sources(found, rest.pop("datasets", None) or [])
    if chats:
        found.put("data.format", "chat")
    elif packing is False and kind is None:
        found.put("data.packing", "none")
    if packing and chats:
        found.put("data.packing", "first_fit_decreasing")
    shared = packing if chats else kind is None and packing is not False
    _attention(found, rest, "flash_attention", True, apart=not shared or rest.get("micro_batch_size") == 1)
    if positive(rest.get("max_steps")):
        rest.pop("num_epochs", None)
    carry(found, rest, AXOLOTL)
    put_precision(found, rest)
    put_optimizer(found, rest, "optimizer")
    name_the_rest(found, rest, _ELSEWHERE)
    return found


def _axolotl_kernels(found: Imported, rest: dict[str, Any]) -> None:
    """Liger's kernels, which a plugin and a switch for each of them turn on."""
    switches = [rest.pop(key) for key in list(rest) if key.startswith("liger_")]
    if any(switches):
        found.put("model.kernels", "auto")
    plugins = rest.pop("plugins", None) or []
    if others := [name for name in plugins if "liger" not in str(name).lower()]:
        rest["plugins"] = others


def _axolotl_sources(found: Imported, datasets: list[Any]) -> bool:
    """Sources of the data sets; returns whether they are chats."""
    sources, chats = [], False
    for number, one in enumerate(datasets):
        rest = dict(one)
        path, kind = str(rest.pop("path", "")), rest.pop("type", None)
        files = rest.pop("data_files", None)
        files = [files] if isinstance(files, str) else files
        named = files or ([path] if Path(path).suffix in FILES else None)
        source: dict[str, Any] = {"type": "hub", "path": path}
        if named:
            source = {"type": rest.pop("ds_type", None) or FILES.get(Path(named[0]).suffix, "json"), "files": named}
        else:
            source |= {key: rest.pop(key) for key in ("name", "split") if key in rest}
        if kind == "chat_template":
            chats = True
            column = rest.pop("field_messages", "messages")
            source |= {} if column == "messages" else {"columns": {"messages": column}}
        elif kind == "completion":
            source |= {"text_column": rest.pop("field", "text")}
        else:
            found.left_out[f"datasets.{number}.type"] = f"{kind!r}: name the columns in data.sources"
        for key in rest:
            found.left_out[f"datasets.{number}.{key}"] = "a source has no such field"
        sources.append(source)
    if sources:
        found.put("data.sources", sources)
    return chats


def _attention(found: Imported, rest: dict[str, Any], key: str, value: Any, *, apart: bool) -> None:
    """Flash attention, where it tells the samples of a row apart or there is one a row."""
    if rest.pop(key, None) != value:
        return
    if apart:
        found.put("model.attn_implementation", "flash_attention_2")
    else:
        found.left_out[key] = "it tells packed samples apart only in micro batches of one row; sdpa does in any"


def from_llama_factory(content: Mapping[str, Any]) -> Imported:
    """From a LLaMA-Factory YAML."""
    found, rest = Imported("LLaMA-Factory"), {**_DEFAULTS, **content}
    rest.setdefault("lora_alpha", 2 * rest.get("lora_rank", 8))
    stage, method = rest.pop("stage", "sft"), rest.pop("finetuning_type", "lora")
    losses = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
    loss, beta = rest.pop("pref_loss", "sigmoid"), rest.pop("pref_beta", None)
    if stage == "dpo" and loss in losses:
        found.recipe |= {"task": "preference", "preference": {"method": losses[loss]}}
    elif stage in ("kto", "rm"):
        found.put("task", {"kto": "kto", "rm": "reward_model"}[stage])
    elif stage == "sft":
        found.put("data.format", "chat")
    elif stage != "pt":
        found.left_out["stage"] = f"{stage!r}{f' with {loss!r}' if stage == 'dpo' else ''} is no kind of training here"
    if beta is not None and stage in ("dpo", "kto"):
        found.put("preference.beta" if stage == "dpo" else "kto.beta", float(beta))
    targets = rest.pop("lora_target", "all")
    if method == "lora":
        found.put("adapter.method", "dora" if rest.pop("use_dora", False) else "lora")
        if targets == "all":
            found.left_out["lora_target"] = "'all': peft's own choice for the family is taken, or name the modules"
        else:
            found.put("adapter.target_modules", [part.strip() for part in targets.split(",")])
    else:
        for key in [key for key in rest if key.startswith("lora_")]:
            rest.pop(key)
    if method not in ("lora", "full"):
        found.left_out["finetuning_type"] = f"{method!r}: name frozen weights in model.freeze"
    if stage == "sft" and (rest.pop("packing", False) or rest.pop("neat_packing", False)):
        found.put("data.packing", "first_fit_decreasing")
    shared = stage == "pt" or "packing" in found.recipe.get("data", {})
    _attention(found, rest, "flash_attn", "fa2", apart=not shared or rest.get("per_device_train_batch_size") == 1)
    if positive(rest.get("max_steps")):
        rest.pop("num_train_epochs", None)
    carry(found, rest, LLAMA_FACTORY)
    put_precision(found, rest)
    put_optimizer(found, rest, "optim")
    reasons = {
        "dataset": "its names stand in dataset_info.json; name the files in data.sources",
        "template": "the tokenizer's own chat template is used; tokenizer.chat_template names another one",
    }
    name_the_rest(found, rest, {**_ELSEWHERE, **reasons})
    return found


def from_deepspeed(content: Mapping[str, Any]) -> Imported:
    """From a DeepSpeed JSON: what a recipe owns into its fields, the rest into `deepspeed.overrides`."""
    found, rest = Imported("DeepSpeed"), dict(content)
    carry(found, rest, DEEPSPEED)
    for precision in ("bf16", "fp16"):
        section = rest.get(precision) or {}
        if section.get("enabled") is True:
            found.put("training.precision", precision)
        if precision in rest:
            extra = {key: value for key, value in rest.pop(precision).items() if key != "enabled" and value != "auto"}
            if extra and section.get("enabled") is True:
                found.put(f"deepspeed.overrides.{precision}", extra)
    zero = dict(rest.pop("zero_optimization", None) or {})
    found.put("zero.stage", zero.pop("stage", 0))
    for name in ("offload_optimizer", "offload_param"):
        offload = dict(zero.pop(name, None) or {})
        device = offload.pop("device", "none")
        if device == "cpu":
            found.put(f"zero.{name}", "cpu")
        elif device == "nvme" and name == "offload_optimizer":
            found.put("zero.offload_optimizer", "nvme")
            found.put("zero.nvme_path", str(offload.pop("nvme_path", "")))
            offload.pop("pin_memory", None)
            zero |= {name: offload} if offload else {}
        elif device != "none":
            found.left_out[f"zero_optimization.{name}"] = f"device {device!r}; cpu is what there is"
    section = rest.pop("optimizer", None) or {}
    kind = str(section.get("type", "AdamW")).lower()
    if kind in ("lion", "fusedlion", "sgd", "muon"):
        found.put("optimizer.type", kind.removeprefix("fused"))
    elif "adam" not in kind:
        found.left_out["optimizer.type"] = f"{section['type']!r}; there are adamw, lion, muon and sgd"
    optimizer = dict(section.get("params") or {})
    if kind in ("sgd", "muon") and "momentum" in optimizer:
        found.put("optimizer.momentum", float(optimizer.pop("momentum")))
    betas = optimizer.pop("betas", None)
    if isinstance(betas, list):
        optimizer |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    optimizer |= {new: optimizer.pop(old) for old, new in _OPTIMIZER.items() if old in optimizer}
    carry(found, optimizer, TRAINING)
    name_the_rest(found, {f"optimizer.params.{key}": value for key, value in optimizer.items()}, {})
    if rest.pop("scheduler", None):
        found.left_out["scheduler"] = "set training.lr_scheduler_type and warmup_steps"
    overrides = {key: value for key, value in rest.items() if value != "auto"}
    if kept := {key: value for key, value in zero.items() if value != "auto"}:
        overrides["zero_optimization"] = kept
    for key, value in overrides.items():
        found.put(f"deepspeed.overrides.{key}", value)
    return found


_OPTIMIZER = {"lr": "learning_rate", "eps": "adam_epsilon"}
