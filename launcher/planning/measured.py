"""The plan beside what was measured: seconds of a step and of its phases, and the memory of a rank. Pure."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from launcher.planning.plan import Plan


class Beside(NamedTuple):
    """One figure; `planned` is `None` where the plan does not know it."""

    name: str
    unit: Literal["seconds", "bytes"]
    planned: float | None
    measured: float


_PHASES = ("data", "forward", "backward", "optimizer")


def planned_seconds(plan: Plan) -> dict[str, float]:
    """Seconds of a step (`step`) and of its phases, by the throughput model; empty when that does not know.

    Forward and backward are divided as their matrix products are, 1 to 2, and recomputation belongs to the backward
    pass; so does the part of the gradients' reduction that nothing covers. Under a pipeline the two run together.
    """
    if plan.step is None:
        return {}
    parts = plan.step.parts
    if plan.layout.pipeline_parallel_size > 1:
        return {"step": plan.step.seconds}
    passes = 4 if plan.recipe.training.gradient_checkpointing else 3
    computing = sum(parts[name] for name in ("matrices", "attention", "elementwise", "head", "tensor"))
    forward = computing / passes
    return {
        "step": plan.step.seconds,
        "forward": forward,
        "backward": computing - forward + parts["data"],
        "optimizer": parts["optimizer"] + parts["offload"],
    }


def planned_memory(plan: Plan) -> int | None:
    """Bytes of the fullest rank at its fullest moment; on CPU with what is offloaded, which is no other memory."""
    if plan.ranks is None:
        return None
    fullest = max(plan.ranks, key=lambda rank: rank.device_bytes)
    return fullest.device_bytes + (fullest.host_bytes if plan.resources.device == "cpu" else 0)


def beside(plan: Plan, metrics: Mapping[str, Any]) -> list[Beside]:
    """The plan beside the newest metrics of a run; only what was measured."""
    planned = planned_seconds(plan)
    phases = metrics.get("phase_seconds") or {}
    seconds = {"a step": metrics.get("step_seconds")} | {name: phases.get(name) for name in _PHASES}
    found = [
        Beside(name, "seconds", planned.get("step" if name == "a step" else name), measured)
        for name, measured in seconds.items()
        if measured is not None
    ]
    if metrics.get("memory_bytes"):
        found.append(Beside("memory of a rank", "bytes", planned_memory(plan), metrics["memory_bytes"]))
    return found
