"""The kinds of training: one file each, and one line in `launcher.recipe.tasks.TASKS`."""

from collections.abc import Mapping
from typing import Any

from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task


def make_task(plan: Plan, facts: Mapping[str, Any] | None = None) -> Task:
    """Make the plan's task.

    Args:
        plan: of the run.
        facts: what its encoder learnt from the data (`PreparedData.facts`).
    """
    task: Task = TASKS[plan.recipe.task].load()(plan, facts or {})
    return task


__all__ = ["Batch", "LossOutput", "Metrics", "Sample", "Task", "make_task"]
