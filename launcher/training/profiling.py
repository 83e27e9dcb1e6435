"""A window of steps under torch's profiler, as the recipe asks for it."""

from typing import Any

import torch

from launcher.recipe.run_sections import ProfilingSection
from launcher.run_directory import RunDirectory


class ProfilerWindow:
    """Records some steps on some ranks, and writes what it saw when they are over.

    One file a rank, `profile/rank_00000_steps_10_12.json.gz`, which https://ui.perfetto.dev and TensorBoard's profiler
    plugin open.

    Args:
        section: of the recipe.
        run_directory: of the run.
        rank: of this process.
    """

    def __init__(self, section: ProfilingSection, run_directory: RunDirectory, rank: int) -> None:
        self._section = section
        self._folder = run_directory.profile
        self._rank = rank
        self._profiler: Any = None
        self._begun = 0
        self._step = 0

    def close(self) -> None:
        """Write what a run that ends inside of the window has recorded."""
        if self._profiler is not None:
            self._write()

    def step_begins(self, step: int) -> None:
        """Start to record when the step is in the window; a run may resume in the middle of it."""
        self._step = step
        section = self._section
        if section.start_step is None or self._rank not in section.ranks or self._profiler is not None:
            return
        if section.start_step <= step < section.start_step + section.num_steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=activities,
                profile_memory=section.memory,
                record_shapes=section.shapes,
                with_stack=section.stacks,
            )
            self._begun = step
            self._profiler.start()

    def step_ends(self) -> None:
        """Stop and write after the last step of the window."""
        section = self._section
        if self._profiler is not None and self._step + 1 >= (section.start_step or 0) + section.num_steps:
            self._write()

    def _write(self) -> None:
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._rank:05d}_steps_{self._begun}_{self._step}.json.gz"
        self._profiler.export_chrome_trace(str(self._folder / name))
        self._profiler = None
