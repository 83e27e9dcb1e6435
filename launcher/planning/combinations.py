"""What combines with what on the pinned DeepSpeed 0.19.8: one literal table, and checks of a model against a layout.

A row stands here only when a test of ours has trained with it and compared every loss and gradient norm with plain
PyTorch's. What has no row is refused, with the nearest row that has the same groups.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem
from launcher.planning.layout import Layout, divisors
from launcher.planning.model_shape import ModelShape, model_shape
from launcher.recipe.schema import Recipe

_ALL_STAGES = frozenset({0, 1, 2, 3})
_ALL_PRECISIONS = frozenset({"fp32", "bf16", "fp16"})
_PIPELINE_STAGES = (
    "DeepSpeed's pipeline refuses stages 2 and 3 (runtime/pipe/engine.py), and under stage 0 clips by a wrong norm, "
    "which leaves out the parameters of all stages but one (runtime/utils.py: clip_grad_norm_)"
)


@dataclass(frozen=True)
class Combination:
    """One legal combination of kinds of groups; data parallelism goes with each of them, at any size.

    Attributes:
        groups: the kinds whose size is above 1: `tensor`, `pipeline`, `sequence`, `expert`.
        zero_stages: stages that it trains under.
        precisions: number formats that it trains in.
        offload: whether optimizer and parameters may live outside of the device.
        reason: what keeps the other stages, precisions or offload out.
        source: where DeepSpeed does it.
        test: ours, under `tests/training/`.
    """

    groups: frozenset[str]
    zero_stages: frozenset[int]
    precisions: frozenset[str]
    offload: bool
    reason: str
    source: str
    test: str


COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        groups=frozenset(),
        zero_stages=_ALL_STAGES,
        precisions=_ALL_PRECISIONS,
        offload=True,
        reason="",
        source="runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py",
        test="test_layouts_zero.py",
    ),
    Combination(
        groups=frozenset({"tensor"}),
        zero_stages=_ALL_STAGES,
        precisions=frozenset({"fp32", "bf16"}),
        offload=False,
        reason="",
        source="runtime/engine.py: _apply_autotp_partitioning (AutoTP, from transformers' tp_plan)",
        test="test_layouts_tensor.py",
    ),
    Combination(
        groups=frozenset({"sequence"}),
        zero_stages=_ALL_STAGES,
        precisions=frozenset({"fp32", "bf16"}),
        offload=False,
        reason="",
        source="runtime/sequence_parallel/ulysses_sp.py (Ulysses, ALST)",
        test="test_layouts_sequence.py",
    ),
    Combination(
        groups=frozenset({"pipeline"}),
        zero_stages=frozenset({1}),
        precisions=frozenset({"fp32", "bf16"}),
        offload=False,
        reason=_PIPELINE_STAGES,
        source="runtime/pipe/engine.py, runtime/pipe/module.py (PipelineModule)",
        test="test_layouts_pipeline.py",
    ),
    Combination(
        groups=frozenset({"tensor", "pipeline"}),
        zero_stages=frozenset({1}),
        precisions=frozenset({"fp32", "bf16"}),
        offload=False,
        reason=_PIPELINE_STAGES,
        source="runtime/pipe/topology.py (PipeModelDataParallelTopology), module_inject/layers.py",
        test="test_layouts_pipeline.py",
    ),
    Combination(
        groups=frozenset({"expert"}),
        zero_stages=frozenset({1, 2}),
        precisions=frozenset({"fp32", "bf16"}),
        offload=False,
        reason="under stage 0 and 3 no test of ours has saved and exported experts",
        source="runtime/engine.py: _configure_expert_parallel (AutoEP)",
        test="test_layouts_expert.py",
    ),
)
"""Every legal combination. The search of layouts enumerates these rows and nothing else."""

FAMILIES_BY_KIND: dict[str, frozenset[str]] = {
    "tensor": frozenset(
        {
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("granite", "smollm3", "starcoder2"),
        }
    ),
    "sequence": frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"}),
    "pipeline": frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}),
    "expert": frozenset({"mixtral", "qwen2_moe", "qwen3_moe"}),
}
"""Families that a test of ours has trained with each kind of groups."""

_TENSOR_IN_PIPELINE = frozenset({"llama", "mistral", "qwen2"})
"""Families whose matrices are divided inside of stages. Qwen 3 and Gemma 3 have weights per head, shared by all heads,
whose gradients AutoTP sums over the ranks and a pipeline does not."""

EXPERT_PRESETS = {"mixtral": "mixtral", "qwen2_moe": "qwen3_moe", "qwen3_moe": "qwen3_moe"}
"""Families whose experts AutoEP finds, and what it calls them (`module_inject/auto_ep_presets`)."""

WHOLE_VOCABULARY = frozenset({"gemma", "gemma2"})
"""Families whose embedding AutoTP cannot shard (`module_inject/layers.py: VocabParallelEmbedding` knows the scaled
embedding of Gemma 3 only). Their tensor-parallel ranks each keep the whole vocabulary."""


def combination_of(layout: Layout) -> Combination | None:
    """The row of a layout's groups, or `None` when no test of ours has trained with them."""
    groups = kinds(layout)
    return next((row for row in COMBINATIONS if row.groups == groups), None)


def kinds(layout: Layout) -> frozenset[str]:
    """Kinds of groups, besides data parallel ones, that have more than one rank in a layout."""
    return frozenset(
        kind for kind in ("tensor", "pipeline", "sequence", "expert") if getattr(layout, f"{kind}_parallel_size") > 1
    )


def combination_problems(layout: Layout, zero_stage: int, precision: str, offloads: bool) -> list[Problem]:
    """Say why a layout cannot train under a ZeRO stage, in a precision, with offload; empty when it can."""
    groups = kinds(layout)
    row = combination_of(layout)
    if row is None:
        verb = "are not trained together" if len(groups) > 1 else "is not trained"
        return [Problem(f"{_named(groups)} {verb} by a test of ours; {_nearest(groups)}", "parallel")]
    problems = []
    if zero_stage not in row.zero_stages:
        message = f"is {zero_stage}, but {_named(groups)} trains under {_either(row.zero_stages)}: {row.reason}"
        problems.append(Problem(f"{message}; set it to {_closest(row.zero_stages, zero_stage)}", "zero.stage"))
    if precision not in row.precisions:
        message = f"is {precision}, but {_named(groups)} is trained by our tests in {_either(row.precisions)} only"
        problems.append(Problem(message, "training.precision"))
    if offloads and not row.offload:
        message = f"no test of ours offloads with {_named(groups)}; leave offload_optimizer and offload_param out"
        problems.append(Problem(message, "zero"))
    return problems


def model_problems(
    config: Mapping[str, Any], layout: Layout, recipe: Recipe, shape: ModelShape | None = None
) -> list[Problem]:
    """Say why a model, or what else a recipe asks for, does not go with a layout; empty when it does.

    Args:
        config: of transformers.
        layout: sizes of the groups.
        recipe: for the sequence length, and for what is asked of the model besides training.
        shape: of the config, where it is known already.
    """
    shape = shape or model_shape(config)
    problems: list[Problem] = []
    for kind in sorted(kinds(layout)):
        name, size = f"{kind}_parallel_size", getattr(layout, f"{kind}_parallel_size")
        families = FAMILIES_BY_KIND[kind]
        if kind == "expert" and shape is not None and shape.num_experts == 0:
            message = f"{shape.model_type} has no experts; set it to 1"
            problems.append(Problem(message, "parallel.expert_parallel_size"))
            continue
        if kinds(layout) >= {"tensor", "pipeline"}:
            families &= _TENSOR_IN_PIPELINE
        if config.get("model_type") not in families or shape is None:
            message = f"{kind} parallelism is not proved for {config.get('model_type')}{_why(config, kind)}"
            message += "; set it to 1" + (f", or train one of {', '.join(sorted(families))}" if families else "")
            problems.append(Problem(message, f"parallel.{name}"))
        else:
            problems += [Problem(message, f"parallel.{name}") for message in _CHECKS[kind](shape, size, recipe)]
            if kind == "expert":
                problems += [Problem(message, f"parallel.{name}") for message in _unlike_experts(config)]
    return problems


def balance_problems(config: Mapping[str, Any], recipe: Recipe) -> list[Problem]:
    """Say that a model without experts has no routers to balance."""
    shape = model_shape(config)
    if not recipe.training.router_aux_loss_coef or shape is None or shape.num_experts:
        return []
    return [Problem(f"{shape.model_type} has no experts; leave it out", "training.router_aux_loss_coef")]


def _tensor_problems(shape: ModelShape, size: int, recipe: Recipe) -> list[str]:
    counts = {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "intermediate_size": shape.intermediate_size,
    }
    wrong = [f"{name} {count}" for name, count in counts.items() if count % size]
    if not wrong:
        return []
    fits = divisors(math.gcd(*counts.values()))
    return [f"{size} does not divide the model's {' and '.join(wrong)}; sizes that do: {_listed(fits)}"]


def _sequence_problems(shape: ModelShape, size: int, recipe: Recipe) -> list[str]:
    problems = []
    heads, kv_heads, length = shape.num_attention_heads, shape.num_key_value_heads, recipe.data.sequence_length
    fits = [d for d in divisors(heads) if kv_heads % d == 0 or d % kv_heads == 0]
    if size not in fits:
        problems.append(
            f"{size} does not go with the model's {heads} heads and {kv_heads} key-value heads; "
            f"sizes that do: {_listed(fits)}"
        )
    if length % size:
        near = f"{length // size * size} or {-(-length // size) * size}"
        problems.append(f"{size} does not divide data.sequence_length {length}; set that to {near}")
    if recipe.model.attn_implementation != "sdpa":
        problems.append(
            f"model.attn_implementation {recipe.model.attn_implementation} is not proved with sequence parallelism; "
            "set it to sdpa"
        )
    return problems


def _pipeline_problems(shape: ModelShape, size: int, recipe: Recipe) -> list[str]:
    problems = []
    layers = shape.num_hidden_layers
    if size > layers:
        problems.append(f"{size} stages for {layers} layers; set it to at most {layers}")
    if recipe.evaluation.generate.prompts:
        problems.append("a pipeline cannot generate text; leave evaluation.generate.prompts out")
    return problems


def _expert_problems(shape: ModelShape, size: int, recipe: Recipe) -> list[str]:
    problems = []
    if shape.num_experts % size:
        fits = _listed(divisors(shape.num_experts))
        problems.append(f"{size} does not divide the model's {shape.num_experts} experts; sizes that do: {fits}")
    if recipe.evaluation.generate.prompts:
        problems.append("ranks that share experts cannot generate text; leave evaluation.generate.prompts out")
    return problems


def _unlike_experts(config: Mapping[str, Any]) -> list[str]:
    """What AutoEP's layer does otherwise than transformers' (`module_inject/auto_ep_layer.py`, `moe/ep_experts.py`)."""
    problems = []
    if config.get("router_jitter_noise"):
        problems.append("AutoEP leaves the model's router_jitter_noise out; set it to 0 in the model's config")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        problems.append(f"AutoEP computes experts with silu, the model's with {activation}; set it to 1")
    return problems


_CHECKS: dict[str, Callable[[ModelShape, int, Recipe], list[str]]] = {
    "tensor": _tensor_problems,
    "sequence": _sequence_problems,
    "pipeline": _pipeline_problems,
    "expert": _expert_problems,
}


def _why(config: Mapping[str, Any], kind: str) -> str:
    if kind == "tensor" and config.get("model_type") == "gpt2":
        return ", whose Conv1D layers AutoTP does not know (module_inject/auto_tp.py)"
    return ""


def _named(groups: frozenset[str]) -> str:
    words = [kind for kind in ("tensor", "pipeline", "sequence", "expert") if kind in groups]
    return f"{' and '.join(words)} parallelism" if words else "data parallelism alone"


def _nearest(groups: frozenset[str]) -> str:
    rows = [row for row in COMBINATIONS if row.groups and row.groups < groups]
    best = [row for row in rows if len(row.groups) == max(len(other.groups) for other in rows)]
    if not best:
        return "set all of their sizes to 1"
    return f"nearest that are: {', '.join(_named(row.groups) for row in best)}"


def _closest(stages: frozenset[int], stage: int) -> int:
    return min(stages, key=lambda known: (abs(known - stage), -known))


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sizes)


def _either(values: frozenset[Any]) -> str:
    return " or ".join(str(value) for value in sorted(values))
