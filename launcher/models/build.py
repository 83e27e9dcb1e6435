"""Models from a config (random weights) or from pretrained weights, as `transformers` classes."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from launcher.errors import ModelError
from launcher.models.compiling import compile_layers
from launcher.models.streaming import streamed_weights
from launcher.models.tiling import tile_loss, tile_mlps
from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS

END_OF_TEXT_ID = 0
"""Id of the one special token of a tokenizer that the recipe trains; its trainer puts it first."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_config(plan: Plan) -> Any:
    """Return the transformers config of the plan's model.

    Raises:
        ModelError: transformers refuses it; the text holds its reason.
    """
    model = plan.recipe.model
    try:
        if model.model_name_or_path is not None:
            return AutoConfig.from_pretrained(model.model_name_or_path)
        if plan.transformers_config is None:
            raise ValueError("the plan holds no configuration")
        fields = dict(plan.transformers_config)
        if plan.recipe.tokenizer.train is not None:
            # A family's own ids (Llama's 2, Phi's 32000) mean something else in, or lie outside of, a vocabulary of
            # our own.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                fields.setdefault(name, END_OF_TEXT_ID)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:
        origin = model.model_name_or_path or "model.config"
        raise ModelError(f"transformers refuses {origin}: {type(error).__name__}: {error}") from error


def build_model(plan: Plan, auto_class: Any, config: Any = None) -> PreTrainedModel:
    """Build the plan's model with weights.

    Random weights are a function of (seed, module name) alone: equal for every ZeRO stage and every layout, because
    each module is initialised under its own seed, with only its own parameters gathered.

    Args:
        plan: names the model, its precision and the ZeRO stage.
        auto_class: the transformers auto class of the task, such as `AutoModelForCausalLM`.
        config: the transformers config; default: `build_config(plan)`.

    Returns:
        The model: fp32 weights from a config (DeepSpeed casts them), on the host; partitioned already under ZeRO 3
        without tensor parallelism.

    Raises:
        ModelError: transformers refuses the model.
    """
    config = build_config(plan) if config is None else config
    attention = _attention(plan, auto_class, config)
    try:
        if plan.recipe.model.model_name_or_path is not None:
            model = _pretrained(plan, auto_class, config, attention)
        else:
            model = _from_scratch(plan, auto_class, config, attention)
    except (ValueError, TypeError, ImportError, OSError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"transformers cannot build the model: {type(error).__name__}: {error}") from error
    model.config.use_cache = False
    if plan.recipe.training.mlp_tiles > 1:
        tile_mlps(model, plan.recipe.training.mlp_tiles)
    if plan.recipe.training.loss_tiles > 1:
        tile_loss(model)
    if plan.recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plan.recipe.training.torch_compile:
        compile_layers(model)
    return model


def _attention(plan: Plan, auto_class: Any, config: Any) -> str:
    """The recipe's attention kernel; `eager` for families that have no `sdpa` (a ResNet has no attention at all)."""
    wanted = plan.recipe.model.attn_implementation
    mapping = auto_class._model_mapping
    if wanted == "sdpa" and type(config) in mapping:
        found = mapping[type(config)]
        models = found if isinstance(found, tuple | list) else [found]
        if not any(model._supports_sdpa for model in models):
            return "eager"
    return wanted


def _from_scratch(plan: Plan, auto_class: Any, config: Any, attention: str) -> PreTrainedModel:
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if partitioned_while_built(plan):
            import deepspeed
            from transformers.integrations.deepspeed import prevent_arange_dtype_change

            # zero.Init makes every new tensor 16 bit, rotary frequencies too; this keeps them fp32 and must come first.
            stack.enter_context(prevent_arange_dtype_change())
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=plan.deepspeed_config))
        model: PreTrainedModel = auto_class.from_config(config, attn_implementation=attention, dtype=torch.float32)
    initialize_weights(model, plan.recipe.seed, partitioned=partitioned_while_built(plan))
    model.tie_weights()
    return model


def partitioned_while_built(plan: Plan) -> bool:
    """Whether ZeRO 3 takes a model apart while it is built, so that no rank ever holds it whole.

    Not with tensor parallelism: `zero.Init` would spread what tensor-parallel ranks all hold (embeddings, norms) over
    the ranks of all of them, and such checkpoints cannot be put together. There each rank holds the whole model on the
    host until `deepspeed.initialize`; pretrained weights are only mapped from their files.
    """
    whole = plan.layout.tensor_parallel_size > 1 or TASKS[plan.recipe.task].built_whole
    return plan.zero_stage == 3 and not whole


def _pretrained(plan: Plan, auto_class: Any, config: Any, attention: str) -> PreTrainedModel:
    with ExitStack() as stack:
        keep = None
        if partitioned_while_built(plan):
            from transformers.integrations import HfDeepSpeedConfig

            # transformers looks at a module-level weak reference to this object; it partitions while loading as long
            # as it lives.
            keep = HfDeepSpeedConfig(plan.deepspeed_config)
            stack.enter_context(streamed_weights())
        model: PreTrainedModel = auto_class.from_pretrained(
            plan.recipe.model.model_name_or_path,
            config=config,
            attn_implementation=attention,
            dtype=DTYPES[plan.recipe.training.precision],
            trust_remote_code=False,
        )
        del keep
    return model


def initialize_weights(
    model: PreTrainedModel, seed: int, *, partitioned: bool, only: tuple[str, nn.Module] | None = None
) -> None:
    """Give every module its transformers initialisation, each under a seed made of `seed` and the module's name.

    Children come before their parents, as in `PreTrainedModel.initialize_weights`, because some families rescale a
    child's weight in the parent (GPT-2's residual projections).

    Args:
        model: built with initialisation suppressed.
        seed: of the recipe.
        partitioned: the parameters are ZeRO-3 shards: gather each module's own and its children's, on all ranks.
        only: not the whole model but a module that stands in it under this name.
    """
    prefix, root = only or ("", model)
    state = torch.random.get_rng_state()
    with torch.no_grad(), guard_torch_init_functions():
        for name, module, owner in _post_order(root, prefix, model):
            torch.manual_seed(_module_seed(seed, name))
            with _gathered(module, partitioned) as writable:
                if writable:
                    owner._initialize_weights(module)
                    if parametrize.is_parametrized(module, "weight"):
                        _initialize_weight_norm(module)
    torch.random.set_rng_state(state)


def _initialize_weight_norm(convolution: Any) -> None:
    """What `Wav2Vec2PreTrainedModel._init_weights` means for its convolution under weight norm (and its relatives').

    It draws `conv.weight`, which is made anew of direction and length whenever it is asked for, so that nothing
    changes; and both have been built without values here.
    """
    parts = convolution.parametrizations.weight
    length, direction = parts.original0, parts.original1
    deviation = 2 * math.sqrt(1 / (convolution.kernel_size[0] * convolution.in_channels))
    nn.init.normal_(direction, mean=0.0, std=deviation)
    along = [dim for dim in range(direction.ndim) if length.shape[dim] == 1]
    length.copy_(direction.norm(dim=along, keepdim=True))


def _module_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big") >> 1


def _post_order(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _post_order(child, f"{name}.{child_name}" if name else child_name, child_owner)
    yield name, module, owner


@contextmanager
def _gathered(module: nn.Module, partitioned: bool) -> Iterator[bool]:
    """Gather a module's own and its direct children's parameters; yields whether this rank writes them."""
    parameters = [*module.parameters(recurse=False)]
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            parameters.extend(child.parameters(recurse=False))
    if not partitioned or not parameters:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield torch.distributed.get_rank() == 0
