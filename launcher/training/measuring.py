"""Evaluation with metrics over all predictions: every sample counts once, whatever the number of ranks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.validation import near_match
from launcher.data.loader import evaluation_batches
from launcher.data.sampler import evaluation_rows
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.run_sections import EvaluationSection
from launcher.run_directory import RunDirectory, write_atomically
from launcher.tasks import Metrics, Sample, Task
from launcher.training.distributed import broadcast, sum_over_ranks
from launcher.training.evaluation import Evaluation
from launcher.training.upstream import set_training, to_device


@torch.no_grad()
def measure(
    engine: Any, task: Task, datasets: Sequence[Sequence[Sample]], plan: Plan, rank: int, device: torch.device
) -> tuple[Evaluation, Metrics]:
    """Evaluate on all ranks together, and let the task measure all predictions on rank 0.

    Args:
        engine: of this rank.
        task: whose `loss` gives predictions.
        datasets: one a validation source.
        plan: its batch sizes count.
        rank: this data-parallel rank.
        device: of this rank.

    Returns:
        Loss and metrics; the same on every rank, but for the report and the text, which only rank 0 has.
    """
    size, micro = plan.layout.data_parallel_size, plan.batch.micro_batch_size
    limit = plan.recipe.evaluation.max_eval_samples
    total = len(evaluation_rows([len(dataset) for dataset in datasets], limit)[0])
    set_training(engine, False)
    loss_sum, num_targets = 0.0, 0
    own: list[tuple[int, dict[str, Any]]] = []
    for number, batch in enumerate(evaluation_batches(datasets, micro, rank, size, limit, task.collate)):
        moved = to_device(batch, device)
        output = task.loss(engine, moved)
        loss_sum += output.loss_sum.item()
        num_targets += int(output.num_targets.item())
        predictions = output.predictions | (task.written(engine, moved) if task.writes else {})
        arrays = {name: values.float().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()
                  for name, values in predictions.items()}  # fmt: skip
        for index in range(micro):
            position = number * micro * size + index * size + rank
            if position < total:
                own.append((position, {name: np.array(values[index]) for name, values in arrays.items()}))
    set_training(engine, True)
    total_loss, total_targets = sum_over_ranks(loss_sum, float(num_targets), device=device)
    evaluation = Evaluation(total_loss / max(total_targets, 1.0), int(total_targets))
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    metrics = Metrics()
    if gathered is not None:
        by_position = dict(pair for part in gathered for pair in part)
        metrics = task.metrics([by_position[position] for position in range(total)], _Chosen(datasets, limit))
    values = broadcast(lambda: metrics.values)
    return evaluation, replace(metrics, values=values)


SMALLER_IS_BETTER = ("loss", "error", "mse", "mae", "perplexity")
"""Ends of the names of metrics of which less is better."""


def watched_score(section: EvaluationSection, evaluation: Evaluation, metrics: Metrics) -> float:
    """The watched metric as a loss is: smaller is better.

    Raises:
        RecipeError: the task has no such metric; says which it has.
    """
    name = section.metric_for_best_model
    known = {"loss": evaluation.loss, **metrics.values}
    if name not in known:
        text = f"there is no metric {name!r}; {near_match(name, list(known)) or 'known: ' + ', '.join(known)}"
        raise RecipeError.single("evaluation.metric_for_best_model", text)
    greater = section.greater_is_better
    if greater is None:
        greater = not name.endswith(SMALLER_IS_BETTER)
    return -known[name] if greater else known[name]


class _Chosen(Sequence[Sample]):
    """The evaluated samples, in order."""

    def __init__(self, datasets: Sequence[Sequence[Sample]], limit: int | None) -> None:
        self._datasets = datasets
        self._sources, self._rows = (
            chosen.tolist() for chosen in evaluation_rows([len(dataset) for dataset in datasets], limit)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._datasets[self._sources[index]][self._rows[index]]


def write_evaluation(run_directory: RunDirectory, step: int, evaluation: Evaluation, metrics: Metrics) -> None:
    """Write `evaluation.json`: the newest evaluation with its report."""
    content = {
        "step": step,
        "loss": evaluation.loss,
        "targets": evaluation.num_targets,
        "metrics": metrics.values,
        "report": metrics.report,
    }
    write_atomically(run_directory.path / "evaluation.json", json.dumps(content, indent=1) + "\n")
