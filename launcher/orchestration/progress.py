"""How far a run is, for people: one line, and the table of what its start took. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

PHASES: Sequence[tuple[str, str, str]] = (
    ("queue", "submitted", "started"),
    ("ray head", "started", "ray_head"),
    ("workers joined", "ray_head", "nodes_joined"),
    ("driver and data", "nodes_joined", "starting"),
    ("worker group", "starting", "running"),
    ("imports and rendezvous", "running", "engine"),
    ("engine", "engine", "data"),
    ("first step", "data", "first_step"),
)
"""What lies between `zerofleet submit` and the first step: name, and the moments at which it begins and ends."""


def phase_table(moments: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each phase took, those that have both of their moments, in order.

    Args:
        moments: Unix times: of the job (`submitted`, ...), of the driver's events (`starting`, `running`), of rank 0's
            timeline (`engine`, `data`, `first_step`).
    """
    if "started" not in moments:  # a cluster that was there before
        moments = {**moments, "nodes_joined": moments["submitted"]} if "submitted" in moments else moments
    table = {
        name: round(moments[end] - moments[begin], 2)
        for name, begin, end in PHASES
        if begin in moments and end in moments and moments[end] >= moments[begin]
    }
    first = next((begin for name, begin, _ in PHASES if name in table), None)
    if first is not None and "first_step" in moments:
        table["in all"] = round(moments["first_step"] - moments[first], 2)
    return table


def render_phases(table: Mapping[str, float]) -> str:
    """The table as text, a line a phase."""
    return "\n".join(f"  {name:<24}{seconds:8.2f} s" for name, seconds in table.items())


def progress_line(
    step: int, max_steps: int, metrics: Mapping[str, Any], phase: str, seconds_remaining: float | None = None
) -> str:
    """One line: step, losses, learning rate, throughput, memory, time to go and what is done at the moment."""
    if not max_steps:
        return phase
    parts = [f"step {step}/{max_steps}"]
    formats = {
        "loss": "loss {:.4f}",
        "eval_loss": "eval {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    parts += [form.format(metrics[key]) for key, form in formats.items() if metrics.get(key) is not None]
    if metrics.get("memory_bytes"):
        parts.append(f"{readable_bytes(metrics['memory_bytes'])}/rank")
    if seconds_remaining is not None:
        parts.append(f"ETA {readable_seconds(seconds_remaining)}")
    return " | ".join([*parts, phase])


def readable_bytes(count: float) -> str:
    """`1.50 GiB` style."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def readable_seconds(seconds: float) -> str:
    """`1:02:03` or `02:03`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


class Pace:
    """Estimates the time to go from the steps of the last looks, so that evaluation and saving are in it."""

    def __init__(self) -> None:
        self._looks: list[tuple[float, int]] = []

    def remaining(self, moment: float, step: int, max_steps: int) -> float | None:
        """Seconds to the end, as of a look at this moment; `None` until the pace is known."""
        self._looks = [*self._looks[-240:], (moment, step)]
        (then, first), (now, last) = self._looks[0], self._looks[-1]
        return (max_steps - last) * (now - then) / (last - first) if last > first else None
