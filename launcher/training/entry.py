"""From a run directory to one rank's training; imported once the worker's environment is set."""

import json
from pathlib import Path

import torch

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.training.context import Phase, WorkerContext
from launcher.training.distributed import join_process_group
from launcher.training.loop import train
from launcher.training.progress import TrainResult


def run_rank(context: WorkerContext) -> TrainResult:
    """Train one rank of the run in `context.run_directory`, whose plan and data the driver has written there."""
    plan = Plan.model_validate_json(context.run_directory.plan.read_bytes())
    location = json.loads(context.run_directory.data.read_text())
    context.heartbeat.enter(Phase.RENDEZVOUS)
    device = join_process_group(plan.resources.device, context.local_rank)
    try:
        return train(plan, context, PreparedData.load(Path(location["directory"])), device)
    finally:
        torch.distributed.destroy_process_group()
