"""`zerofleet plan`: what a run would do, as text or JSON, without starting anything."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.orchestration.progress import readable_bytes

if TYPE_CHECKING:
    from launcher.planning.plan import Plan


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the recipe.")] = None,
    profile: Annotated[str | None, typer.Option(help="Where it would run: a name or a file. Default: local.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a run would do; starts nothing.

    That is: layout, batch arithmetic, model size, memory under each ZeRO stage, and the exact DeepSpeed config.
    """
    from cluster.profile import load_profile
    from launcher.planning.plan import make_plan
    from launcher.recipe.loading import read_recipe
    from launcher.submit import resources_of

    loaded = read_recipe(recipe, overrides or ())
    resources = resources_of(load_profile(profile))
    with loaded.locating():
        resolved = make_plan(loaded.recipe, resources)
    if as_json:
        print(resolved.model_dump_json(indent=2))
    else:
        _print_text(resolved)


def _print_text(plan: "Plan") -> None:
    typer.secho(plan.recipe.name, bold=True)
    for label, text in _facts(plan):
        print(f"  {label:<14}{text}")
    if plan.ranks is not None:
        typer.secho("Memory of each rank: states + activations + buffers in the backward pass", bold=True)
        for row, fullest in _rank_rows(plan):
            typer.secho(row, bold=fullest)
    if plan.memory_by_stage is not None:
        typer.secho("Model states on each rank under each ZeRO stage, without activations", bold=True)
        for row, chosen in _memory_rows(plan):
            typer.secho(row, bold=chosen)
    typer.secho("DeepSpeed config", bold=True)
    print(json.dumps(plan.deepspeed_config, indent=2))
    for note in plan.notes:
        print(f"note: {note}")


def _facts(plan: "Plan") -> Iterator[tuple[str, str]]:
    """The plan in sentences; every number is shown with the arithmetic that gives it."""
    training, layout, batch, resources = plan.recipe.training, plan.layout, plan.batch, plan.resources
    yield (
        "workers",
        f"{resources.world_size} = {resources.nodes} {'nodes' if resources.nodes > 1 else 'node'} "
        f"x {resources.workers_per_node} a node, on {resources.device}",
    )
    sizes = {
        "tensor": layout.tensor_parallel_size,
        "pipeline": layout.pipeline_parallel_size,
        "sequence": layout.sequence_parallel_size,
    }
    sizes = {"data": layout.data_parallel_size} | {name: size for name, size in sizes.items() if size > 1}
    factors = " x ".join(f"{name}-parallel {size}" for name, size in sizes.items())
    expert = f", expert-parallel {layout.expert_parallel_size}" if layout.expert_parallel_size > 1 else ""
    yield "layout", f"{layout.world_size} = {factors}{expert}"
    yield (
        "global batch",
        f"{batch.global_batch_size} samples = micro batch {batch.micro_batch_size} x accumulation "
        f"{batch.gradient_accumulation_steps} x data-parallel {layout.data_parallel_size}",
    )
    length = plan.recipe.data.sequence_length
    tokens = batch.global_batch_size * length
    yield "a step", f"{tokens:,} tokens = {batch.global_batch_size} samples x sequence length {length:,}"
    if training.max_steps is not None:
        yield "all steps", f"{training.max_steps * tokens:,} tokens = {training.max_steps:,} steps x {tokens:,}"
    else:
        yield "all steps", f"{training.num_train_epochs:g} epochs"
    yield "precision", f"{training.precision}, ZeRO stage {plan.zero_stage}"
    if plan.model is not None:
        model = plan.model
        yield (
            "model",
            f"{model.model_type}: {model.num_hidden_layers} layers, hidden size {model.hidden_size:,}, "
            f"{model.num_attention_heads} heads ({model.num_key_value_heads} for keys and values), "
            f"vocabulary {model.vocab_size:,}",
        )
        yield (
            "parameters",
            f"{model.num_parameters:,}, of them {model.num_parameters_non_embedding:,} without embeddings",
        )


def _rank_rows(plan: "Plan") -> Iterator[tuple[str, bool]]:
    """A table of the pipeline's stages, the fullest marked where there are several, in lines that fit 80 columns."""
    columns = {"states": 11, "activations": 13, "buffers": 11, "backward": 11, "step": 11, "host": 11}
    yield " " * 11 + "".join(f"{column:>{width}}" for column, width in columns.items()), False
    ranks = plan.ranks or ()
    most = max(rank.device_bytes for rank in ranks)
    for rank in ranks:
        fullest = rank.device_bytes == most and len(ranks) > 1
        states = rank.states.device_bytes
        buffers = rank.buffers + rank.overhead
        activations = rank.backward_bytes - states - buffers
        sizes = (states, activations, buffers, rank.backward_bytes, rank.step_bytes, rank.host_bytes)
        cells = zip(sizes, columns.values(), strict=True)
        row = "".join(f"{readable_bytes(size) if size else '-':>{width}}" for size, width in cells)
        name = f"stage {rank.stage}" if len(ranks) > 1 else ""
        yield f"{'>' if fullest else ' '} {name:<9}{row}", fullest


def _memory_rows(plan: "Plan") -> Iterator[tuple[str, bool]]:
    """A table of the four ZeRO stages, the chosen one marked, in lines that all fit 80 columns."""
    columns = ("parameters", "gradients", "optimizer", "together", "host memory")
    yield "  " + " " * 7 + "".join(f"{column:>13}" for column in columns), False
    for stage, memory in (plan.memory_by_stage or {}).items():
        chosen = stage == plan.zero_stage
        sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.device_bytes, memory.host_bytes)
        row = "".join(f"{readable_bytes(size) if size else '-':>13}" for size in sizes)
        yield f"{'>' if chosen else ' '} ZeRO {stage} {row}", chosen
