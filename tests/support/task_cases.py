"""What ranks can be asked about tasks; runs in their processes."""

import os
from pathlib import Path
from typing import Any

import torch
from cases import _context

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.tasks.sentence_embedding import contrastive_loss
from launcher.training.measuring import measure as measure_all
from launcher.training.session import open_session


def measure(run_directory: str, data: str) -> dict[str, Any]:
    """Evaluate a fresh model, on as many ranks as there are."""
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    prepared = PreparedData.load(Path(data))
    session = open_session(plan, _context(run_directory), prepared, torch.device("cpu"))
    datasets = prepared.split("validation")
    evaluation, metrics = measure_all(
        session.engine, session.task, datasets, plan, int(os.environ["RANK"]), session.device
    )
    if session.monitor is not None:
        session.monitor.close()
    session.engine.destroy()
    return {
        "loss": evaluation.loss,
        "targets": evaluation.num_targets,
        "values": metrics.values,
        "report": metrics.report,
    }


def contrastive(places: list[Any], counted: list[bool], temperature: float) -> dict[str, Any]:
    """The contrastive loss of this rank's half of the samples; its gradient by their places."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    part = len(counted) // size
    own = torch.tensor(places)[:, rank * part : (rank + 1) * part].clone().requires_grad_()
    anchors, *candidates = torch.nn.functional.normalize(own, dim=-1)
    present = torch.tensor(counted)[rank * part : (rank + 1) * part]
    loss = contrastive_loss(anchors, candidates, present, temperature)
    loss.backward()
    assert own.grad is not None
    return {"loss": loss.item(), "gradient": own.grad.tolist()}
