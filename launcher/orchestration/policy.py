"""What to do about a failure: another attempt, without whom, after how long, or none. Pure: no ray, no torch."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from launcher.orchestration.failure import TOO_MANY_BAD_LOSSES, Category, Failure, FailureKind, Verdict
from launcher.recipe.run_sections import FaultToleranceSection


@dataclass(frozen=True)
class Incident:
    """What ended an attempt.

    Attributes:
        cause: the first failure.
        verdict: what it means.
        started: whether the attempt had made a step; if not, it failed while starting.
        saved_step: step of the newest checkpoint that is committed, or kept in memory; 0 without one.
    """

    cause: Failure
    verdict: Verdict
    started: bool
    saved_step: int


@dataclass(frozen=True)
class Retry:
    """Start the worker group again from the newest checkpoint.

    Attributes:
        number: of this restart in its budget, from 1.
        budget: which one: `start`, `crash`, `preemption` or `numeric`.
        delay_seconds: to wait before.
        exclude: nodes that get no workers any more, all of them.
    """

    number: int
    budget: str
    delay_seconds: float
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class GiveUp:
    """End the run as failed."""

    reason: str


@dataclass
class FailurePolicy:
    """Decides between another attempt and giving up.

    Three budgets, because the three say different things. Failures before the first step are mostly mistakes, so few
    are allowed. Crashes are a fact of large clusters: the budget is what may happen between two checkpoints, and a new
    checkpoint refills it. A preemption says nothing about the run.

    Attributes:
        settings: of the recipe.
        random: for the jitter of delays, so that many runs that failed together do not start together.
    """

    settings: FaultToleranceSection
    random: Random = field(default_factory=Random)
    excluded: list[str] = field(default_factory=list)
    _used: Counter[str] = field(default_factory=Counter)
    _failures_of: Counter[str] = field(default_factory=Counter)
    _saved_step: int = 0
    _last_error: tuple[str, int] | None = None

    def decide(self, incident: Incident) -> Retry | GiveUp:
        """Decide on what ended an attempt."""
        self._refill(incident)
        hopeless = self._hopeless(incident)
        if hopeless is not None:
            return GiveUp(hopeless)
        budget, name, limit = self._budget(incident)
        if limit is not None and self._used[budget] >= limit:
            since = (
                f" since the checkpoint at step {self._saved_step}" if budget == "crash" and self._saved_step else ""
            )
            return GiveUp(f"{self._used[budget]} of fault_tolerance.{name} {limit} restarts are used up{since}")
        self._used[budget] += 1
        self._blame(incident)
        delay = 0.0 if budget in ("preemption", "numeric") else self._delay(self._used[budget])
        return Retry(self._used[budget], budget, delay, tuple(self.excluded))

    def _refill(self, incident: Incident) -> None:
        if incident.started:
            self._used["start"] = 0
        if incident.saved_step > self._saved_step:
            self._saved_step = incident.saved_step
            self._used["crash"] = 0

    def _hopeless(self, incident: Incident) -> str | None:
        """Why a restart would meet the same again, or None."""
        cause, category = incident.cause, incident.verdict.category
        if cause.exception == TOO_MANY_BAD_LOSSES:
            return f"fault_tolerance.max_bad_losses {self.settings.max_bad_losses} batches are left out already"
        if category is Category.NUMERIC:
            return "the recipe's fault_tolerance.on_bad_loss is stop" if self.settings.on_bad_loss == "stop" else None
        if cause.kind is FailureKind.EXPECTED:
            return "restarting would meet the same error"
        if category is not Category.ERROR:
            self._last_error = None
            return None
        error = (cause.signature, cause.step)
        repeated, self._last_error = error == self._last_error, error
        if repeated:
            return (
                f"the same exception at the same step {cause.step}, twice: it lies in the recipe, the data or the code"
            )
        return None

    def _budget(self, incident: Incident) -> tuple[str, str, int | None]:
        """(budget, its name in the recipe, its size)."""
        if incident.verdict.category is Category.PREEMPTION:
            return "preemption", "max_preemptions", self.settings.max_preemptions
        if incident.verdict.category is Category.NUMERIC:
            return "numeric", "max_bad_losses", self.settings.max_bad_losses
        if not incident.started:
            return "start", "max_start_failures", self.settings.max_start_failures
        return "crash", "max_restarts", self.settings.max_restarts

    def _delay(self, number: int) -> float:
        """None before the first restart, which is mostly the only one; then doubled each time, with jitter."""
        if number == 1:
            return 0.0
        delay = self.settings.restart_delay_seconds * 2.0 ** min(number - 2, 30)
        return min(delay, self.settings.max_restart_delay_seconds) * self.random.uniform(0.75, 1.25)

    def _blame(self, incident: Incident) -> None:
        """Count against the node, unless the failure says nothing about it."""
        cause, limit = incident.cause, self.settings.exclude_node_after
        machine = incident.verdict.category in (Category.INFRASTRUCTURE, Category.HANG)
        if not cause.node or cause.is_echo or not machine:
            return
        self._failures_of[cause.node] += 1
        if limit is not None and self._failures_of[cause.node] >= limit and cause.node not in self.excluded:
            self.excluded.append(cause.node)
