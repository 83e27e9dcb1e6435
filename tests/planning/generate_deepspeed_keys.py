"""Write launcher/planning/deepspeed_keys.json from the installed DeepSpeed.

Run it after an upgrade of DeepSpeed: python tests/planning/generate_deepspeed_keys.py

The top level and the sections that DeepSpeed reads key by key are found by parsing a config that notes every key it is
asked for; the other sections are pydantic models and say their fields themselves. In the file a leaf is its type and
bounds as text (`int|null >= 0`) or the list of allowed values, a section is an object.
"""

import copy
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "launcher" / "planning" / "deepspeed_keys.json"

# Sections that DeepSpeed reads key by key; those it reads only when they are there must be there to be noted.
READ_BY_KEY: dict[str, Any] = {
    "activation_checkpointing": {},
    "aio": {},
    "autotuning": {},
    "checkpoint": {"parallel_write": {}, "writer": {}},
    "data_efficiency": {"data_sampling": {}, "data_routing": {}},
    "data_types": {},
    "expert_parallel": {"enabled": False},
    "flops_profiler": {},
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "torch_autocast": {},
}
# Sections whose keys are DeepSpeed's or the caller's own affair further down: anything is let through.
FREE = ("checkpoint.writer", "data_efficiency.data_sampling", "data_efficiency.data_routing", "scheduler.params")
# Types where DeepSpeed's default is None and so does not tell.
TYPES = {
    "checkpoint.writer": "object|null",
    "communication_data_type": ["fp16", "bf16", "fp32"],
    "data_types.buffer_dtype": "str|null",
    "data_types.grad_accum_dtype": ["fp16", "bf16", "fp32"],
    "data_types.keep_in_fp32_modules": "any",
    "data_types.param_dtype": "str|null",
    "gradient_accumulation_steps": "int > 0",
    "log_level": "str|null",
    "seq_parallel_communication_data_type": ["fp16", "bf16", "fp32"],
    "steps_per_print": "int|null",
    "torch_autocast.dtype": "str",
    "torch_autocast.lower_precision_safe_modules": "list",
    "train_batch_size": "int > 0",
    "train_micro_batch_size_per_gpu": "int > 0",
    "vocabulary_size": "int|null",
}
RENAMED_BY_HAND = {
    "bfloat16": "bf16",  # precision_config.py: BFLOAT16_OLD
    "optimizer.params.max_grad_norm": "gradient_clipping",  # engine.py: _configure_basic_optimizer raises on it
}
REMOVED_BY_HAND = {
    # engine.py: _configure_zero_optimizer raises on it
    "zero_optimization.legacy_stage1": "The old implementation of ZeRO stage 1 has been removed from DeepSpeed.",
}


class Noting(dict[str, Any]):
    """A config section that notes every key it is asked for, with the default that the asker falls back to."""

    def __init__(self, values: dict[str, Any], asked: dict[str, Any]) -> None:
        self.asked = asked
        super().__init__(
            {key: Noting(value, asked.setdefault(key, {})) if isinstance(value, dict) else value
             for key, value in values.items()}
        )  # fmt: skip

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.setdefault(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().keys()))

    def __copy__(self) -> "Noting":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Noting":
        return self


def collect() -> dict[str, Any]:
    """Ask the installed DeepSpeed for its keys."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime import config as ds_config

    asked: dict[str, Any] = {}
    values = copy.deepcopy(READ_BY_KEY)
    parsed = ds_config.DeepSpeedConfig(Noting({"train_micro_batch_size_per_gpu": 1, **values}, asked))

    keys: dict[str, Any] = {}
    for name, default in asked.items():
        keys[name] = _noted(name, default)
    for name, model in _models().items():
        keys[name] = _fields(model)
    keys["timers"] = {"throughput": _fields(_timer_model())}
    keys["pipeline"] = dict.fromkeys(sorted({*parsed.pipeline, *_pipeline_keys()}), "any")
    keys["optimizer"] = {"legacy_fusion": "bool", "type": "str", "params": _adam_arguments()}
    for name in re.findall(r'"(\w+)" in config', inspect.getsource(deepspeed.initialize)):
        keys[name] = "int > 0"
    keys["datastates_ckpt"] = "any"
    # Asked for, to be refused: they are not keys.
    removed = dict(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}": text for key, text in ds_config._REMOVED_ZERO_CONFIG_KEYS.items()}
    removed |= REMOVED_BY_HAND
    renamed = {**_renamed("zero_optimization", _models()["zero_optimization"]), **RENAMED_BY_HAND}
    for path in [*removed, *renamed]:
        _drop(keys, path)
    return {"deepspeed": deepspeed.__version__, "keys": _sorted(keys), "renamed": renamed, "removed": removed}


def render() -> str:
    """Return the file's text."""
    return json.dumps(collect(), indent=1) + "\n"


def _models() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monitors = {name: info.annotation for name, info in DeepSpeedMonitorConfig.model_fields.items()}
    return {
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "fp16": DeepSpeedFP16Config,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "weight_quantization": WeightQuantConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        **monitors,
    }


def _timer_model() -> Any:
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return DeepSpeedThroughputTimerConfig


def _noted(path: str, default: Any) -> Any:
    if path in TYPES:
        return TYPES[path]
    if path in FREE:
        return "object"
    if path in READ_BY_KEY and isinstance(default, dict):
        return {key: _noted(f"{path}.{key}", value) for key, value in default.items()}
    if isinstance(default, dict) and default:
        return {key: _noted(f"{path}.{key}", value) for key, value in default.items()}
    kinds = {bool: "bool", int: "int", float: "float", str: "str", dict: "object", list: "list"}
    return kinds.get(type(default), "any")


def _fields(model: Any) -> dict[str, Any]:
    """Fields of a pydantic model, under their names and their aliases."""
    fields = {}
    for name, info in model.model_fields.items():
        spec = _annotation(info.annotation, info.metadata)
        fields[name] = spec
        if info.alias is not None:
            fields[info.alias] = spec
    return fields


def _annotation(annotation: Any, metadata: list[Any]) -> Any:
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [choice for choice in choices if choice is not type(None)]
        if len(inner) > 1:
            return "any"
        spec = _annotation(inner[0], metadata)
        if isinstance(spec, str) and spec != "any" and len(inner) < len(choices):
            head, _, bounds = spec.partition(" ")
            return f"{head}|null {bounds}".strip()
        return spec
    if origin is typing.Literal:
        return list(choices)
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return _fields(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return sorted({member.value for member in annotation})
    names = {bool: "bool", int: "int", float: "float", str: "str", Path: "str"}
    if annotation in names:
        return " ".join([names[annotation], *_bounds(metadata)])
    return {list: "list", dict: "object"}.get(origin or annotation, "any")


def _bounds(metadata: list[Any]) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [
        f"{sign} {getattr(item, name):g}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]


def _renamed(section: str, model: Any) -> dict[str, str]:
    renamed = {}
    for name, info in model.model_fields.items():
        extra = info.json_schema_extra or {}
        if extra.get("deprecated"):
            renamed[f"{section}.{name}"] = f"{section}.{extra['new_param']}"
    return renamed


def _pipeline_keys() -> list[str]:
    from deepspeed.runtime.pipe import engine

    return re.findall(r"_config\.pipeline(?:\.get\(|\[)['\"](\w+)['\"]", inspect.getsource(engine))


def _adam_arguments() -> dict[str, str]:
    """What `optimizer.params` may hold: the arguments of the Adams that the engine can make, and its own switches."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    arguments = set()
    for optimizer in (torch.optim.AdamW, DeepSpeedCPUAdam, FusedAdam):
        arguments |= set(inspect.signature(optimizer.__init__).parameters)
    arguments -= {"self", "params", "model_params", "adamw_mode", "set_grad_none"}
    return {**dict.fromkeys(arguments, "any"), "torch_adam": "bool", "adam_w_mode": "bool"}


def _drop(keys: dict[str, Any], path: str) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        keys = keys.get(section, {})
    keys.pop(leaf, None)


def _sorted(keys: Any) -> Any:
    return {key: _sorted(keys[key]) for key in sorted(keys)} if isinstance(keys, dict) else keys


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
