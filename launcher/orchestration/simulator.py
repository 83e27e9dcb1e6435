"""What goodput to expect of a run on a cluster that fails: the real supervisor and policy, simulated. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from launcher.orchestration.accounting import ATTEMPT_ENDS, Account, Ledger, account
from launcher.orchestration.policy import FailurePolicy
from launcher.orchestration.scenario import DAY, Recorder, Scenario, VirtualClock
from launcher.orchestration.simulated_group import SimulatedGroup
from launcher.orchestration.states import RunState
from launcher.orchestration.supervisor import Supervisor
from launcher.recipe.run_sections import FaultToleranceSection

INTERVAL_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the Young-Daly interval that are simulated for a recommendation."""
SPARE_QUANTILE = 0.99


@dataclass(frozen=True)
class Simulation:
    """How a simulated run went.

    Attributes:
        scenario: what was simulated.
        account: where the time went.
        events: as `events.jsonl` would have them.
        failures: of nodes.
        ended: `complete` when the time was over, `failed` when the policy gave up before.
        reason: why it gave up.
    """

    scenario: Scenario
    account: Account
    events: Sequence[dict[str, Any]]
    failures: int
    ended: str
    reason: str

    @property
    def goodput(self) -> float:
        """Share of the simulated days that made progress which was kept; what follows a failed run counts as lost."""
        return self.account.seconds.get("training", 0.0) / (self.scenario.days * DAY)

    @property
    def progress(self) -> float:
        """Steps that were kept, relative to as many days on all nodes without any trouble."""
        steps = [event["ledger"]["step"] for event in self.events if "ledger" in event]
        return (steps[-1] if steps else 0) * self.scenario.step_seconds / (self.scenario.days * DAY)

    @property
    def hours_between_failures(self) -> float:
        """Mean, measured; infinite without a failure."""
        return self.account.wall / 3600 / self.failures if self.failures else math.inf


def simulate(scenario: Scenario, settings: FaultToleranceSection) -> Simulation:
    """Let the supervisor bring a simulated run through its days; the same scenario gives the same events."""
    clock = VirtualClock()
    group, recorder = SimulatedGroup(scenario, clock), Recorder(clock)

    def on_event(state: RunState, facts: dict[str, Any]) -> None:
        beat = supervisor.status.beats.get(0)
        ledger = {"ledger": Ledger.of(beat).as_json()} if beat is not None and state in ATTEMPT_ENDS else {}
        recorder.add(state.value, facts, **ledger)

    policy = FailurePolicy(settings, Random(scenario.seed + 1))  # noqa: S311 - dice, not keys
    supervisor = Supervisor(group, policy, clock, clock.sleep, on_event, wall_clock=clock)
    recorder.add(RunState.STARTING.value, {"driver_started": 0.0, "moments": {}})
    while not supervisor.step().is_final:
        if clock.now >= scenario.days * DAY and not supervisor.state.has_workers:
            supervisor.request_stop("the simulated days are over")
    last = recorder.events[-1]
    return Simulation(
        scenario,
        account(recorder.events),
        recorder.events,
        group.failures,
        supervisor.state.value,
        last.get("reason", ""),
    )


def mean_hours_between_failures(nodes: int, failures_per_node_day: float) -> float:
    """MTTF of a run: `1 / (N r_f)` (Kokolis et al., arXiv 2410.21680), in hours."""
    return 24.0 / (nodes * failures_per_node_day)


def expected_goodput(
    nodes: int, failures_per_node_day: float, save_seconds: float, restart_seconds: float, interval_seconds: float
) -> float:
    """E[ETTR] of Kokolis et al. (arXiv 2410.21680): `(1 - N r_f (u0 + dt/2)) / (1 + w/dt)`.

    To first order in the failure rate: it holds where a failure within a restart or within the work done again is
    rare, that is where `N r_f (u0 + dt)` is small.

    Args:
        nodes: N.
        failures_per_node_day: r_f.
        save_seconds: w, for which a checkpoint stops training.
        restart_seconds: u0, from a failure to the first step after it.
        interval_seconds: dt, between two checkpoints.
    """
    rate = nodes * failures_per_node_day / DAY
    return (1 - rate * (restart_seconds + interval_seconds / 2)) / (1 + save_seconds / interval_seconds)


def best_interval(nodes: int, failures_per_node_day: float, save_seconds: float) -> float:
    """Seconds between two checkpoints that lose the least: `sqrt(2 w / (N r_f))` (Young 1974, Daly 2006)."""
    return math.sqrt(2 * save_seconds * DAY / (nodes * failures_per_node_day))


@dataclass(frozen=True)
class Recommendation:
    """What to set.

    Attributes:
        save_steps: with the highest simulated goodput.
        tried: goodput by save_steps.
        spare_nodes: enough for 99 % of the time, by the number of nodes that are in repair at a time.
        rigid_progress: kept steps without the elastic size, relative to days without trouble.
        elastic_progress: the same when the run goes on with as few as half of its nodes; None for both when lost nodes
            are replaced at once.
    """

    save_steps: int
    tried: dict[int, float]
    spare_nodes: int
    rigid_progress: float | None
    elastic_progress: float | None


def recommend(scenario: Scenario, settings: FaultToleranceSection) -> Recommendation:
    """Simulate other checkpoint intervals, and say how many spare nodes the failures call for."""
    rate = 1 / scenario.mtbf_node_days
    best = best_interval(scenario.nodes, rate, scenario.save_seconds) / scenario.step_seconds
    candidates = sorted({max(1, round(best * factor)) for factor in INTERVAL_FACTORS} | {scenario.save_steps})
    tried = {steps: simulate(replace(scenario, save_steps=steps), settings).goodput for steps in candidates}
    lost = rate + scenario.preemptions_per_node_day
    in_repair = scenario.nodes * lost * scenario.repair_hours / 24
    sizes: tuple[float | None, float | None] = (None, None)
    if scenario.spare_nodes is not None:
        rigid, elastic = (
            simulate(replace(scenario, min_nodes=least), settings).progress
            for least in (None, max(1, scenario.nodes // 2))
        )
        sizes = (rigid, elastic)
    best_steps = max(tried, key=lambda steps: tried[steps])
    return Recommendation(best_steps, tried, _poisson_quantile(in_repair, SPARE_QUANTILE), *sizes)


def _poisson_quantile(mean: float, share: float) -> int:
    """Smallest k with P(X <= k) >= share; nodes in repair are Poisson when failures are (an M/G/infinity queue)."""
    if mean > 700:  # exp(-mean) underflows; there the normal approximation is within one node
        return math.ceil(mean + 2.326 * math.sqrt(mean))
    term = total = math.exp(-mean)
    count = 0
    while total < share:
        count += 1
        term *= mean / count
        total += term
    return count
