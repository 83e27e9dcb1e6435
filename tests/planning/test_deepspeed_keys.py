import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.planning.deepspeed_keys import key_problems, known_keys


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = Path(__file__).with_name("generate_deepspeed_keys.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def messages(config: dict[str, Any]) -> dict[str, str]:
    return dict(key_problems(config))


def test_the_list_is_that_of_the_installed_deepspeed(generator: ModuleType) -> None:
    assert generator.TARGET.read_text() == generator.render(), "run tests/planning/generate_deepspeed_keys.py"


def test_the_list_is_not_a_stub() -> None:
    keys = known_keys()["keys"]
    assert len(keys) > 40
    assert len(keys["zero_optimization"]) > 40
    assert len(keys["expert_parallel"]) > 20
    assert {"amp", "elasticity", "nebula", "zero_optimization.mics_shard_size"} <= set(known_keys()["removed"])
    assert not set(keys) & set(known_keys()["removed"])


@pytest.mark.parametrize("path", known_keys()["removed"])
def test_every_removed_key_says_so(path: str) -> None:
    section, _, key = path.rpartition(".")
    found = messages({section: {key: {}}} if section else {key: {}})
    assert found[path].startswith("DeepSpeed 0.19.8 refuses it: ")


def test_every_top_level_removed_key_is_refused_by_deepspeed_itself() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    top = [path for path in known_keys()["removed"] if "." not in path]
    assert len(top) > 8
    for key in top:
        with pytest.raises(DeepSpeedConfigError):
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: {}})


@pytest.mark.parametrize(
    ("config", "where", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping", "did you mean gradient_clipping?"),
        ({"zero_optimization": {"stgae": 2}}, "zero_optimization.stgae", "did you mean stage?"),
        ({"stage": 2}, "stage", "did you mean zero_optimization.stage?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "did you mean device?",
        ),
        ({"optimizer": {"params": {"beta": [0.9, 0.95]}}}, "optimizer.params.beta", "did you mean betas?"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload",
            "is deprecated in DeepSpeed 0.19.8; use zero_optimization.offload_optimizer",
        ),
        ({"bfloat16": {"enabled": True}}, "bfloat16", "is deprecated in DeepSpeed 0.19.8; use bf16"),
        (
            {"optimizer": {"params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm",
            "is deprecated in DeepSpeed 0.19.8; use gradient_clipping",
        ),
        ({"zzz": 1}, "zzz", "DeepSpeed 0.19.8 does not know this key"),
    ],
)
def test_an_unknown_key_comes_with_what_was_meant(config: dict[str, Any], where: str, message: str) -> None:
    found = messages(config)
    assert list(found) == [where]
    assert found[where].endswith(message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": {"enabled": "yes"}}, 'is "yes", but must be true or false'),
        ({"bf16": True}, "must be an object, not true"),
        ({"zero_optimization": True}, "must be an object, not true"),
        ({"zero_optimization": {"stage": 4}}, "is 4, but must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "is true, but must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "2"}}, 'is "2", but must be one of 0, 1, 2, 3'),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "is 0, but must be a whole number > 0"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "is 1.5, but must be a whole number > 0"),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 1.5}}},
            "is 1.5, but must be a number >= 0 <= 1",
        ),
        ({"train_batch_size": 0}, "is 0, but must be a whole number > 0"),
        ({"communication_data_type": "int8"}, 'is "int8", but must be one of "fp16", "bf16", "fp32"'),
        ({"steps_per_print": "never"}, 'is "never", but must be a whole number or null'),
        ({"wandb": {"group": 3}}, "is 3, but must be text or null"),
        ({"zero_optimization": {"leaf_module": {"names": "mlp"}}}, 'is "mlp", but must be a list'),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(config: dict[str, Any], message: str) -> None:
    assert list(messages(config).values()) == [message]


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": None, "stage3_max_live_parameters": 1e9}},
        {"zero_optimization": {"stage": "auto", "prefetch_bucket_size": "auto"}, "steps_per_print": None},
        {"gradient_clipping": 1, "train_batch_size": "auto", "optimizer": "auto"},
        {"tensor_parallel": {"autotp_size": 2, "partition_config": {"anything": 1}}, "datastates_ckpt": {"x": 1}},
        {"checkpoint": {"writer": {"type": "python"}, "tag_validation": "Fail"}, "data_efficiency": {"enabled": False}},
        {"communication_data_type": "bf16", "pipeline": {"use_reentrant": False, "stages": "auto"}},
    ],
)
def test_what_deepspeed_takes_is_let_through(config: dict[str, Any]) -> None:
    assert messages(config) == {}


def test_deepspeeds_own_sample_of_every_section_is_known(generator: ModuleType) -> None:
    """A config that holds every key of the list parses in DeepSpeed itself, section by section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    listed = set(known_keys()["keys"]["zero_optimization"])
    fields = {name for name, info in DeepSpeedZeroConfig.model_fields.items() for name in (name, info.alias) if name}
    deprecated = {path.rpartition(".")[2] for path in (*known_keys()["renamed"], *known_keys()["removed"])}
    assert listed == fields - deprecated
    assert json.loads(generator.render()) == known_keys()
