"""Which weights of a model are trained: all of them, those that no pattern freezes, or an adapter's (`peft`)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from cluster.validation import near_match
from launcher.errors import ModelError
from launcher.models.build import DTYPES
from launcher.planning.plan import Plan
from launcher.recipe.task_sections import AdapterSection

DECISIVE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "num_virtual_tokens")
"""Settings of an adapter in peft on which it depends what its weights mean."""
UNKNOWN_STEPS = 1_000_000
"""Of a run whose length is not known yet; peft wants a number."""


def choose_trained(model: Any, plan: Plan, adapter_task: str | None) -> Any:
    """Freeze what the recipe freezes, and add its adapter.

    An adapter's first weights are a function of the recipe's seed.

    Args:
        model: of transformers; under ZeRO 3 partitioned already.
        plan: names the adapter or the patterns.
        adapter_task: peft's name of the kind of task.

    Returns:
        The model, or peft's around it.

    Raises:
        ModelError: a pattern matches nothing, nothing is left to train, or peft refuses the adapter.
    """
    recipe = plan.recipe
    if recipe.adapter is None:
        freeze(model, recipe.model.freeze, recipe.model.unfreeze)
        return model
    adapted = add_adapter(model, recipe.adapter, adapter_task, recipe.seed)
    if plan.zero_stage == 3:
        _cast(adapted, DTYPES[recipe.training.precision])
    return adapted


def _cast(adapted: nn.Module, dtype: torch.dtype) -> None:
    """Give an adapter the model's type of numbers, as DeepSpeed's engine does to all weights under the lower stages.

    Under stage 3 it takes weights as they are (`runtime/engine.py: _configure_distributed_model`), and peft makes its
    own in fp32: they would be multiplied in fp32, with copies in fp32 of what goes in and comes out.
    """
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def freeze(model: nn.Module, frozen: Sequence[str], kept: Sequence[str]) -> None:
    """Freeze parameters by glob.

    Raises:
        ModelError: a pattern matches no parameter, or all are frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in (*frozen, *kept):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ModelError(
                f"model.freeze: no parameter matches {pattern!r}; {_suggestion(pattern.strip('*.'), list(parameters))}"
            )
    for name, parameter in parameters.items():
        is_frozen = any(fnmatchcase(name, pattern) for pattern in frozen)
        parameter.requires_grad_(not is_frozen or any(fnmatchcase(name, pattern) for pattern in kept))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("model.freeze leaves no parameter to train; name some in model.unfreeze")


def add_adapter(model: Any, section: AdapterSection, adapter_task: str | None, seed: int) -> Any:
    """Put an adapter on a model; only its weights are trained from then on.

    Raises:
        ModelError: the target modules match nothing, or peft refuses the model.
    """
    from peft import get_peft_model

    _check_targets(model, section)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, _peft_config(section, adapter_task))
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"peft cannot put {section.method} on this model: {type(error).__name__}: {error}") from error
    finally:
        torch.random.set_rng_state(state)
    if section.adapter_name_or_path is not None:
        _begin_with(adapted, section.adapter_name_or_path)
    return adapted


def _begin_with(adapted: Any, name: str) -> None:
    """Give a new adapter the weights of another one.

    Raises:
        ModelError: it cannot be loaded, or is of another method, shape or scale.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    where = f"adapter.adapter_name_or_path: the adapter {name}"
    try:
        theirs, weights = PeftConfig.from_pretrained(name), load_peft_weights(name, device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{where} cannot be loaded: {error}") from error
    own = adapted.peft_config["default"]
    pairs = {field: (getattr(theirs, field, None), getattr(own, field, None)) for field in DECISIVE}
    differing = [f"{field} {there!r} there, {here!r} here" for field, (there, here) in pairs.items() if there != here]
    if differing:
        raise ModelError(f"{where} is another one: {'; '.join(differing)}")
    unknown = set_peft_model_state_dict(adapted, weights).unexpected_keys
    if unknown or len(weights) != sum(parameter.requires_grad for parameter in adapted.parameters()):
        raise ModelError(
            f"{where} has not the weights of this model's; beyond them: {', '.join(unknown[:3]) or 'none'}"
        )


def _peft_config(section: AdapterSection, adapter_task: str | None) -> Any:
    import peft

    targets: dict[str, Any] = {
        "task_type": adapter_task,
        "target_modules": list(section.target_modules) or None,
        "modules_to_save": list(section.modules_to_save) or None,
    }
    prompt: dict[str, Any] = {"task_type": adapter_task, "num_virtual_tokens": section.num_virtual_tokens}
    if section.method == "adalora":
        # The training loop sets the schedule, when it knows how many steps there are.
        return peft.AdaLoraConfig(
            **targets,
            target_r=section.r,
            init_r=section.initial_rank,
            lora_alpha=section.lora_alpha,
            lora_dropout=section.lora_dropout,
            orth_reg_weight=section.adalora.orthogonality,
            total_step=UNKNOWN_STEPS,
        )
    if section.method == "ia3":
        return peft.IA3Config(**targets)
    if section.method == "prefix_tuning":
        return peft.PrefixTuningConfig(**prompt)
    if section.method == "prompt_tuning":
        return peft.PromptTuningConfig(**prompt)
    if section.method == "p_tuning":
        return peft.PromptEncoderConfig(**prompt)
    return peft.LoraConfig(
        **targets,
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        use_rslora=section.method == "rslora",
        use_dora=section.method == "dora",
    )


def _check_targets(model: nn.Module, section: AdapterSection) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for target in section.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_matrix(module)})
            raise ModelError(
                f"adapter.target_modules: no module's name ends with {target!r}; {_suggestion(target, ends)}"
            )


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _suggestion(word: str, known: Sequence[str]) -> str:
    return near_match(word, known) or f"there are {', '.join(list(known)[:10])}, ..."
