"""The kinds of training: one file each, and one line in `TASKS`."""

from launcher.tasks.base import Batch, LossOutput, Sample, Task
from launcher.tasks.causal_lm import CausalLanguageModelling

TASKS = {"causal_lm": CausalLanguageModelling}
"""Name in a recipe -> class, made from the plan."""

__all__ = ["TASKS", "Batch", "LossOutput", "Sample", "Task"]
