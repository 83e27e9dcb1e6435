"""Write launcher/planning/model_config_fields.json from the installed transformers.

Run it after an upgrade of transformers: python tests/planning/generate_model_config_fields.py
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "launcher" / "planning" / "model_config_fields.json"

# Read by PreTrainedConfig or its callers, though no dataclass field: see transformers/configuration_utils.py.
READ_BY_BASE_CLASS = (
    "model_type",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "torch_dtype",
    "num_labels",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
    "per_layer_config",
    "name_or_path",
    "_name_or_path",
    "sliding_window_pattern",
    "_remove_final_layer_norm",
)


def collect() -> dict[str, Any]:
    """List the fields of every counted family's config class."""
    from transformers import AutoConfig, PreTrainedConfig

    from launcher.planning.families import FAMILIES

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} | set(READ_BY_BASE_CLASS)
    families = {}
    for model_type in sorted(FAMILIES):
        config_class: Any = type(AutoConfig.for_model(model_type))
        names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
        families[model_type] = sorted(names - common)
    return {"every_family": sorted(common), "families": families}


def render() -> str:
    """Return the file's text."""
    return json.dumps(collect(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
