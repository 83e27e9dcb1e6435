"""Mixtures of experts: how much their routers' balance weighs in the loss."""

from typing import Any

from launcher.errors import RecipeError


def balance_weight(config: Any, wanted: float | None) -> float:
    """Weight of the load-balancing loss of a mixture of experts (Fedus et al., arXiv 2101.03961, equations 4 to 6).

    Args:
        config: of transformers.
        wanted: by the recipe; `None`: what the config says, as transformers itself does.

    Raises:
        RecipeError: the recipe wants it of a model for which transformers computes none.
    """
    known = getattr(config, "router_aux_loss_coef", None)
    if wanted is None:
        return float(known or 0.0) if getattr(config, "output_router_logits", False) else 0.0
    if wanted > 0 and known is None:
        message = f"transformers computes no load-balancing loss for {config.model_type}; leave it out"
        raise RecipeError.single("training.router_aux_loss_coef", message)
    return wanted
