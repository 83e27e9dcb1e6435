"""What the ranks of `ranks.py` can be asked to do; runs in their processes."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from launcher.training.context import Heartbeat, WorkerContext
from launcher.training.loop import open_session, train


def _context(run_directory: str) -> WorkerContext:
    rank = int(os.environ["RANK"])
    return WorkerContext(RunDirectory.at(run_directory), rank, int(os.environ["WORLD_SIZE"]), rank, Heartbeat(rank))


def run(run_directory: str, data: str, stop_after: int | None = None) -> dict[str, Any]:
    """Train the plan in a run directory; `stop_after` asks to stop during that step's successor."""
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    context = _context(run_directory)
    if stop_after is not None:
        _stop_at(context, stop_after)
    return asdict(train(plan, context, PreparedData.load(Path(data)), torch.device("cpu")))


def _stop_at(context: WorkerContext, step: int) -> None:
    heartbeat = context.heartbeat
    enter = heartbeat.enter

    def watching(phase: Any) -> None:
        if heartbeat.step >= step:
            context.stop.set()
        enter(phase)

    heartbeat.enter = watching  # type: ignore[method-assign]  # watched from here


def logits(run_directory: str, data: str, input_ids: list[list[int]]) -> list[Any]:
    """Logits of the engine resumed from the newest checkpoint."""
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    session = open_session(plan, _context(run_directory), PreparedData.load(Path(data)), torch.device("cpu"))
    session.engine.eval()
    with torch.no_grad():
        output = session.engine(input_ids=torch.tensor(input_ids), use_cache=False).logits
    if session.monitor is not None:
        session.monitor.close()
    session.engine.destroy()
    result: list[Any] = output.float().tolist()
    return result


def initial_weights(run_directory: str, data: str) -> dict[str, Any]:
    """Checksums of the freshly built model's parameters, gathered, by name."""
    import deepspeed

    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    session = open_session(plan, _context(run_directory), PreparedData.load(Path(data)), torch.device("cpu"))
    sums = {}
    for name, parameter in session.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=plan.zero_stage == 3):
            weights = parameter.detach().double()
            sums[name] = [float(weights.sum()), float(weights.abs().sum())]
    if session.monitor is not None:
        session.monitor.close()
    session.engine.destroy()
    return sums
