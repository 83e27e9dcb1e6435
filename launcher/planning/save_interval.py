"""How often to save: what a save costs against what a failure loses."""

import math
import statistics
from dataclasses import dataclass

from launcher.run_directory import RunDirectory, read_json_lines


@dataclass(frozen=True)
class SaveCost:
    """What saving costs a run, as it was measured.

    Attributes:
        blocked_seconds: that training waits for a save.
        seconds: from its beginning until it is committed; a failure meanwhile finds the one before it.
        step_seconds: of one optimizer step.
    """

    blocked_seconds: float
    seconds: float
    step_seconds: float


@dataclass(frozen=True)
class SaveAdvice:
    """The interval that loses the least time, and what is then lost.

    Attributes:
        save_steps: optimizer steps between two saves.
        seconds: the same in seconds.
        lost_seconds: of work, by one failure, on average.
        overhead: share of the time that goes into saves and lost work together.
    """

    save_steps: int
    seconds: float
    lost_seconds: float
    overhead: float


def best_interval(blocked_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of training between two saves that lose the least time to saves and failures.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), eq. 37; its first term is J. W. Young's of 1974.

    Args:
        blocked_seconds: that training waits for a save.
        seconds_between_failures: of the whole run, on average.
    """
    cost, mean = blocked_seconds, seconds_between_failures
    if cost >= 2 * mean:
        return mean
    ratio = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + ratio / 3 + ratio**2 / 9) - cost


def advise(cost: SaveCost, nodes: int, hours_between_failures: float) -> SaveAdvice:
    """Recommend how often to save.

    Args:
        cost: of a save of this run.
        nodes: of the run; any of them ends it.
        hours_between_failures: of one node, on average.
    """
    mean = hours_between_failures * 3600 / nodes
    wanted = max(best_interval(cost.blocked_seconds, mean), cost.seconds)  # one save is written at a time
    steps = max(1, round(wanted / cost.step_seconds))
    interval = steps * cost.step_seconds
    lost = interval / 2 + cost.seconds
    return SaveAdvice(steps, interval, lost, min(1.0, cost.blocked_seconds / interval + lost / mean))


def measured_cost(run_directory: RunDirectory) -> SaveCost | None:
    """What saving has cost a run so far, or None when it has not saved yet; medians, without the first save.

    The first one pays for the memory that the later ones find ready.
    """
    saves = [record for record in read_json_lines(run_directory.saves) if record["saved"]]
    saves = saves[1:] or saves
    steps = [record["step_seconds"] for record in read_json_lines(run_directory.metrics) if record.get("step_seconds")]
    if not saves or not steps:
        return None
    return SaveCost(
        blocked_seconds=statistics.median(record["blocked_seconds"] for record in saves),
        seconds=statistics.median(record["seconds"] for record in saves),
        step_seconds=statistics.median(steps),
    )
