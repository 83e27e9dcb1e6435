"""A checkpoint without its run: measure it, or let it write, in one process."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoints.manifest import read_manifest
from launcher.data.store import PreparedData
from launcher.errors import CheckpointError, DataError, ExpectedError
from launcher.planning.alone import plan_alone
from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS
from launcher.tasks import Metrics, Sample, Task, make_task
from launcher.training.consolidation import averaged_weights, trained_state_dict, whole_weights
from launcher.training.evaluation import Evaluation
from launcher.training.measuring import measure


def whole_model(plan: Plan, prepared: PreparedData) -> tuple[Plan, Task, Any]:
    """Build a plan's model as training begins with it, in this process, whole, in fp32.

    Returns:
        The plan for one process, the task and the model, in evaluation mode.
    """
    alone = plan_alone(plan.recipe, plan.batch.micro_batch_size, plan.resources.device)
    task = make_task(alone, prepared.facts)
    model: Any = task.build_model()
    return alone, task, model.eval()


def load_checkpoint(folder: Path, plan: Plan, prepared: PreparedData) -> tuple[Plan, Task, Any]:
    """Build a checkpoint's model as `whole_model` does; with the averaged weights, where those are used.

    Raises:
        CheckpointError: the weights do not fit the plan's model.
    """
    manifest = read_manifest(folder)
    alone, task, model = whole_model(plan, prepared)
    averaged = dict(averaged_weights(folder, manifest)) if plan.recipe.training.uses_average else None
    if plan.recipe.adapter is not None:
        state = trained_state_dict(folder, manifest.zero_stage) if averaged is None else averaged
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        state = dict(whole_weights(folder, manifest)) if averaged is None else averaged
        wanted = set(model.state_dict()) - set(model.all_tied_weights_keys)
    if missing := wanted - set(state):
        raise CheckpointError(f"checkpoint {folder} does not hold the plan's model; missing: {sorted(missing)[:5]}")
    model.load_state_dict({name: values for name, values in state.items() if name in model.state_dict()}, strict=False)
    return alone, task, model


def evaluate_checkpoint(
    folder: Path, plan: Plan, prepared: PreparedData, max_samples: int | None
) -> tuple[Evaluation, Metrics]:
    """Measure a checkpoint on the validation data.

    Raises:
        DataError: there is none.
    """
    held_out(prepared)
    alone, task, model = load_checkpoint(folder, plan, prepared)
    return measure_alone(alone, task, model, prepared, max_samples)


def held_out(prepared: PreparedData) -> Sequence[Sequence[Sample]]:
    """The samples to measure on.

    Raises:
        DataError: there are none.
    """
    datasets: Sequence[Sequence[Sample]] = prepared.split("validation")
    if not any(len(dataset) for dataset in datasets):
        raise DataError("nothing is held out: the recipe has neither validation_fraction nor validation_sources")
    return datasets


def measure_alone(
    alone: Plan, task: Task, model: Any, prepared: PreparedData, max_samples: int | None
) -> tuple[Evaluation, Metrics]:
    """Measure a model that `load_checkpoint` has built, in this process.

    Raises:
        DataError: nothing is held out.
    """
    datasets = held_out(prepared)
    section = alone.recipe.evaluation.model_copy(update={"max_eval_samples": max_samples})
    alone = alone.model_copy(update={"recipe": alone.recipe.model_copy(update={"evaluation": section})})
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not declare it
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return measure(model, task, datasets, alone, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        model.eval()


def figures_alone(
    alone: Plan, task: Task, model: Any, prepared: PreparedData, max_samples: int | None
) -> dict[str, float]:
    """Loss and metrics by name, as `measure_alone` finds them."""
    evaluation, metrics = measure_alone(alone, task, model, prepared, max_samples)
    return {"loss": evaluation.loss, **metrics.values}


def whole_to_export(folder: Path, plan: Plan, prepared: PreparedData, option: str) -> tuple[Plan, Task, Any]:
    """Build a checkpoint's model as `load_checkpoint` does, for an export that changes it; an adapter is merged.

    Args:
        folder: of the checkpoint.
        plan: of its run.
        prepared: its data.
        option: of the command line, for the error.

    Raises:
        ExpectedError: the adapter is a prompt, which leaves the model as it is.
    """
    adapter = plan.recipe.adapter
    if adapter is not None and adapter.is_prompt:
        raise ExpectedError(
            f"{option}: {adapter.method} leaves the model as it is, so there is nothing to change in it"
        )
    alone, task, model = load_checkpoint(folder, plan, prepared)
    return alone, task, model if adapter is None else model.merge_and_unload().eval()


def restore_scalars(model: Any, task: Task) -> None:
    """Give parameters that are trained as vectors of one element (CLIP's temperature) their own shape again."""
    with torch.device("meta"):
        plain = task.auto_class.from_config(model.config)
    for name, parameter in plain.named_parameters():
        if parameter.ndim == 0:
            own = model.get_parameter(name)
            own.data = own.data.view(())


def continuations(
    folder: Path, plan: Plan, prepared: PreparedData, prompts: Iterable[str], max_new_tokens: int, temperature: float
) -> Iterator[tuple[str, str]]:
    """Let a checkpoint continue prompts, one at a time; or write what stands for them (`seq2seq_lm`).

    Yields:
        Prompt and continuation.

    Raises:
        ExpectedError: the task's model writes no text.
    """
    entry = TASKS[plan.recipe.task]
    if not entry.generates and not entry.rewrites:
        raise ExpectedError(f"the model of task {plan.recipe.task} writes no text")
    from transformers import AutoTokenizer

    _, _, model = load_checkpoint(folder, plan, prepared)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    prefix = plan.recipe.seq2seq.source_prefix if entry.rewrites else ""
    end = prepared.facts["end_token_id"] if entry.rewrites else tokenizer.eos_token_id
    torch.manual_seed(plan.recipe.seed)
    for prompt in prompts:
        inputs = tokenizer(prefix + prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                eos_token_id=end,
                use_cache=True,
            )
        begin = 1 if entry.rewrites else inputs["input_ids"].shape[1]
        yield prompt, tokenizer.decode(output[0, begin:], skip_special_tokens=True)
