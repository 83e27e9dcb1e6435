"""What ranks can be asked to do about bad losses; runs in their processes."""

import os
from typing import Any

import cases

from launcher.errors import BadLossesError
from launcher.tasks import LossOutput
from launcher.training import session


def run_spoiled(run_directory: str, data: str, spoils: list[dict[str, Any]]) -> dict[str, Any]:
    """Train, and multiply the losses of some forward passes, so that their gradients are as bad as they are.

    Args:
        run_directory: of the run.
        data: folder of the prepared data.
        spoils: `rank`, `forward` (a number from 0, discarded passes count) and `factor`.
    """
    factors = {spoil["forward"]: spoil["factor"] for spoil in spoils if spoil["rank"] == int(os.environ["RANK"])}
    make_task, made = session.make_task, 0

    def make_spoiled(*arguments: Any) -> Any:
        task = make_task(*arguments)
        loss = task.loss

        def spoiled(model: Any, batch: Any) -> LossOutput:
            nonlocal made
            output = loss(model, batch)
            if not (model.training and hasattr(model, "micro_steps")):  # an evaluation, or a look beside the engine
                return output
            made += 1
            return LossOutput(output.loss_sum * factors.get(made - 1, 1.0), output.num_targets, output.metrics)

        task.loss = spoiled
        return task

    session.make_task = make_spoiled
    try:
        return cases.run(run_directory, data)
    finally:
        session.make_task = make_task


def refusal_of_spoiled(run_directory: str, data: str, spoils: list[dict[str, Any]]) -> str | None:
    """The same for a run that gives up; returns why it does."""
    try:
        run_spoiled(run_directory, data, spoils)
    except BadLossesError as error:
        return str(error)
    return None
