"""Small configs of every family that the planner knows."""

from typing import Any

from launcher.planning.families import FAMILIES


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A config of a family, small, with sizes that all differ."""
    config: dict[str, Any] = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 112, "ffn_dim": 176, "word_embed_proj_dim": 64,
    }  # fmt: skip
    if family == "gemma3_text":
        config["num_hidden_layers"] = 6  # five layers with a window and one without
    known = FAMILIES[family]
    names = {name: alias for alias, name in known.aliases.items()}
    fitting = {names.get(key, key): value for key, value in config.items() if key in known.defaults}
    return {"model_type": family, **fitting, **changes}
