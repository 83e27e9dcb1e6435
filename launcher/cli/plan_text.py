"""A plan, a search and a comparison as text of at most 80 columns where tables allow it."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from launcher.orchestration.progress import readable_bytes

if TYPE_CHECKING:
    from launcher.planning.plan import Plan
    from launcher.planning.search import Choice, Judged, SearchResult

SHOWN = 10


def print_plan(plan: "Plan") -> None:
    """Print all of it."""
    typer.secho(plan.recipe.name, bold=True)
    for label, text in _facts(plan):
        print(f"  {label:<14}{text}")
    if plan.ranks is not None:
        typer.secho("Memory of each rank: states + activations + buffers in the backward pass", bold=True)
        for row, fullest in _rank_rows(plan):
            typer.secho(row, bold=fullest)
    if plan.step is not None:
        step = plan.step
        typer.secho(f"Time of a step on {step.accelerator}, estimated: {readable_time(step.seconds)}", bold=True)
        print(f"  {step.tokens_per_second_per_device:,.0f} tokens/s a device, {step.mfu:.1%} MFU")
        for row in _time_rows(step.parts):
            print(row)
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
    kept = plan.recipe.fault_tolerance.memory_checkpoint
    if kept is not None:
        from launcher.planning.kept_states import kept_bytes

        size = "" if plan.ranks is None else f", in {readable_bytes(kept_bytes(plan.recipe, plan.ranks, resources))}"
        where = "its own and the next node's" if resources.nodes > 1 else "the node's"
        yield "in memory", f"the state of every {kept.every_steps} steps in {where} host memory{size} of each at most"
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


def readable_time(seconds: float) -> str:
    """`1.23 s` or `12.3 ms`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _time_rows(parts: dict[str, float]) -> Iterator[str]:
    from launcher.planning.search import WORDS

    total = sum(parts.values())
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        if seconds:
            yield f"  {readable_time(seconds):>9} {seconds / total:>6.1%}  {WORDS[name]}"


def print_search(result: "SearchResult", recipe: str) -> None:
    """Print the best ten, why the others lost, and the command that takes the best one."""
    from launcher.planning.search import nothing_fits, why_slower

    unfit = result.num_choices - len(result.best)
    room = "" if result.memory is None else f" into {readable_bytes(result.memory)} a device"
    typer.secho(f"{result.num_choices} layouts, of which {unfit} do not fit{room}", bold=True)
    if not result.best:
        print(nothing_fits(result))
        return
    print("     a step  tokens/s    MFU     memory  layout")
    for place, item in enumerate(result.best[:SHOWN], start=1):
        print(f"{place:>2} {_search_row(item)}")
        if place > 1:
            print(f"   {why_slower(item, result.best[0])}")
    if result.closest is not None:
        print(f"the smallest that does not fit: {_memory(result.closest)}, {describe(result.closest.choice)}")
    typer.secho("The best one as overrides", bold=True)
    print(f"zerofleet plan {recipe} {' '.join(result.best[0].choice.overrides())}")


def _search_row(item: "Judged") -> str:
    step = item.step
    return (
        f"{readable_time(step.seconds):>8} {step.tokens_per_second_per_device:>9,.0f} {step.mfu:>6.1%} "
        f"{_memory(item):>10}  {describe(item.choice)}"
    )


def _memory(item: "Judged") -> str:
    return readable_bytes(item.rank.device_bytes)


def describe(choice: "Choice") -> str:
    """A choice in a few words."""
    layout = choice.layout
    sizes = {
        "data": layout.data_parallel_size,
        "tensor": layout.tensor_parallel_size,
        "pipeline": layout.pipeline_parallel_size,
        "sequence": layout.sequence_parallel_size,
        "expert": layout.expert_parallel_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data"]
    offloaded = [name for name in ("optimizer", "param") if getattr(choice, f"offload_{name}") != "none"]
    words += [f"ZeRO {choice.zero_stage}{f' offload {chr(43).join(offloaded)}' if offloaded else ''}"]
    words += [f"micro batch {choice.batch.micro_batch_size} x {choice.batch.gradient_accumulation_steps}"]
    return ", ".join(words) + (", recomputing" if choice.gradient_checkpointing else "")


def print_comparison(before: "Plan", after: "Plan", changes: list[str]) -> None:
    """Print what each part of memory and time is before and after a change."""
    from launcher.planning.explain import compare

    typer.secho(f"{before.recipe.name}: {' '.join(changes)}", bold=True)
    print(f"  {'':<44}{'before':>11}{'after':>11}{'change':>11}")
    for row in compare(before, after):
        form = readable_bytes if row.unit == "bytes" else readable_time if row.unit == "seconds" else _plain
        cells = [form(row.before), form(row.after), _signed(row.after - row.before, form)]
        print(f"  {row.name:<44}" + "".join(f"{cell:>11}" for cell in cells))


def _plain(value: float) -> str:
    return f"{value:,.0f}"


def _signed(value: float, form: "Callable[[float], str]") -> str:
    return "-" if value == 0 else f"{'+' if value > 0 else '-'}{form(abs(value))}"


def beside_lines(plan: "Plan", metrics: "Mapping[str, Any]") -> list[str]:
    """The plan beside what was measured, a line each; none before anything was."""
    from launcher.planning.measured import beside

    lines = []
    for row in beside(plan, metrics):
        form = readable_bytes if row.unit == "bytes" else readable_time
        planned = "-" if row.planned is None else form(row.planned)
        lines.append(f"{row.name:<20}{planned:>12}{form(row.measured):>12}")
    return [f"{'':<20}{'planned':>12}{'measured':>12}", *lines] if lines else []
