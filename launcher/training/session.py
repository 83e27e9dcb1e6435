"""Everything one rank holds while it trains, and how it comes to be."""

from dataclasses import dataclass
from typing import Any

import torch

from launcher.data.loader import Collate
from launcher.data.store import PreparedData
from launcher.models.compiling import use_kernels
from launcher.planning.layout import Coordinates
from launcher.planning.plan import Plan
from launcher.tasks import Task, make_task
from launcher.training.around_steps import AroundSteps
from launcher.training.checkpoint import CheckpointManager
from launcher.training.context import Phase, WorkerContext
from launcher.training.engine import build_engine, total_steps
from launcher.training.monitor import Monitor
from launcher.training.numeric import LossWatch
from launcher.training.passes import Passes, make_passes, own_part
from launcher.training.progress import Progress
from launcher.training.save_triggers import SaveTriggers
from launcher.training.skipping import why_not_in_place
from launcher.training.swap_folder import SwapFolder, open_swap_folder


@dataclass
class Session:
    """Everything one rank holds while it trains."""

    plan: Plan
    context: WorkerContext
    device: torch.device
    task: Task
    prepared: PreparedData
    engine: Any
    checkpoints: CheckpointManager
    progress: Progress
    max_steps: int
    monitor: Monitor | None
    losses: LossWatch
    place: Coordinates
    passes: Passes
    collate: Collate
    triggers: SaveTriggers | None
    around: AroundSteps
    swap: SwapFolder | None
    skips_in_place: bool


def open_session(plan: Plan, context: WorkerContext, prepared: PreparedData, device: torch.device) -> Session:
    """Build model and engine, and load the newest checkpoint."""
    heartbeat = context.heartbeat
    heartbeat.enter(Phase.ENGINE)
    task = make_task(plan, prepared.facts)
    samples = sum(len(dataset) for dataset in prepared.split("train"))
    max_steps = total_steps(plan.recipe.training, samples, plan.batch.global_batch_size)
    torch.manual_seed(plan.recipe.seed)
    model = task.build_model()
    if (notice := use_kernels(model, plan, device)) and context.rank == 0:
        heartbeat.notify(notice)
    swap = open_swap_folder(plan)
    engine = build_engine(plan, model, max_steps, swap)
    heartbeat.enter(Phase.LOAD)
    progress = Progress()
    around = AroundSteps(plan, engine, prepared, max_steps, context.rank, lambda: progress.step)
    checkpoints = CheckpointManager(
        context.run_directory.checkpoints,
        plan,
        prepared.fingerprint,
        heartbeat.notify,
        around.average,
        context.memory,
        around.ranks,
    )
    progress = checkpoints.load(engine)
    heartbeat.begun(progress.step, max_steps, from_memory=checkpoints.from_memory)
    skips = plan.recipe.fault_tolerance.on_bad_loss == "skip"
    if skips and (why := why_not_in_place(plan, engine.module)) is not None:
        skips = False
        if context.rank == 0:
            heartbeat.notify(f"fault_tolerance.on_bad_loss: skip goes back to the last checkpoint here: {why}")
    monitor = Monitor(plan, context.run_directory, progress.step, device) if context.rank == 0 else None
    return Session(
        plan=plan,
        context=context,
        device=device,
        task=task,
        prepared=prepared,
        engine=engine,
        checkpoints=checkpoints,
        progress=progress,
        max_steps=max_steps,
        monitor=monitor,
        losses=LossWatch(plan.recipe.fault_tolerance, context.run_directory, context.rank),
        place=plan.layout.coordinates(context.rank),
        passes=make_passes(plan, engine, task, device, heartbeat, around.before_step),
        collate=own_part(task.collate, plan.layout, plan.layout.coordinates(context.rank)),
        triggers=SaveTriggers(context.run_directory, plan.recipe.checkpoint) if context.rank == 0 else None,
        around=around,
        swap=swap,
        skips_in_place=skips,
    )
