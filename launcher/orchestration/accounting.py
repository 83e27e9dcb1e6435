"""Where a run's time went: every second between its first and its last event, by what it was spent on. Pure.

The driver's events cut the time into spans, and rank 0's ledger, which stands in the event that ends an attempt, cuts
the attempt's span into phases. What the ledger does not know of a span (a worker cannot count the time after its
death) is the rest of it, so the parts always add up to the whole.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from launcher.orchestration.states import RunState
from launcher.training.context import STEP_PHASES, Beat, Phase

INTERRUPTED = "interrupted"
"""State in the event that a driver writes for the driver before it, which ended without a word."""

STRAGGLER = "straggler"
"""State in the record of a slow rank; the run's own state does not change."""
RESUMED = "resumed"
"""State in the record of an attempt that began with a state in memory; the run's own state does not change."""
RECORDS = (STRAGGLER, RESUMED)

START_PHASES = (Phase.IMPORT, Phase.RENDEZVOUS, Phase.ENGINE, Phase.LOAD)
JOB_MOMENTS = (
    ("submitted", "started", "queue"),
    ("started", "ray_head", "start-up: ray head"),
    ("ray_head", "nodes_joined", "start-up: workers joined"),
    ("started", "nodes_joined", "start-up: ray"),
    ("nodes_joined", "driver", "start-up: driver"),
    ("submitted", "driver", "queue"),
)
"""Two moments of a job, and what lies between them."""
FAILED_ENDS = (RunState.RECOVERING, RunState.FAILED, INTERRUPTED)
ATTEMPT_ENDS = (*FAILED_ENDS, RunState.COMPLETE, RunState.STOPPED, RunState.RESIZING)
NOT_ALLOCATED = ("queue", "idle: between jobs")


@dataclass(frozen=True)
class Ledger:
    """What rank 0 spent an attempt's time on; the fields are those of `Beat`."""

    spent: Mapping[str, float] = field(default_factory=dict)
    spent_before_save: Mapping[str, float] = field(default_factory=dict)
    first_step_seconds: float = 0.0
    steps_made: int = 0
    step: int = 0
    saved_step: int = 0
    kept_step: int = 0
    spent_before_keep: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, beat: Beat) -> "Ledger":
        """The ledger in a heartbeat."""
        return cls(
            {name: round(seconds, 4) for name, seconds in beat.spent.items()},
            {name: round(seconds, 4) for name, seconds in beat.spent_before_save.items()},
            round(beat.first_step_seconds, 4),
            beat.steps_made,
            beat.step,
            beat.saved_step,
            beat.kept_step,
            {name: round(seconds, 4) for name, seconds in beat.spent_before_keep.items()},
        )

    def going_back_to(self, kept_step: int) -> "Ledger":
        """The same for who goes on from a state in memory, if one is newer than the newest checkpoint."""
        if kept_step <= self.saved_step or not self.spent_before_keep:
            return self
        return replace(self, spent_before_save=self.spent_before_keep)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


@dataclass(frozen=True)
class Span:
    """A stretch of the run's time.

    Attributes:
        begin: Unix time.
        end: Unix time.
        name: `attempt 2`, `recovery`, `queue`, ...
        outcome: how it ended: a state's name, or empty.
        facts: of the event that ended it.
        parts: seconds by what they were spent on; they add up to the span.
    """

    begin: float
    end: float
    name: str
    outcome: str
    facts: Mapping[str, Any]
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Account:
    """Where a run's time went.

    Attributes:
        spans: that follow each other without gaps.
        stragglers: records of the slow ranks that were found.
    """

    spans: Sequence[Span]
    stragglers: Sequence[Mapping[str, Any]] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by what they were spent on, the largest first."""
        totals: defaultdict[str, float] = defaultdict(float)
        for span in self.spans:
            for name, seconds in span.parts.items():
                totals[name] += seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    @property
    def wall(self) -> float:
        """Seconds from the first event to the last."""
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def allocated(self) -> float:
        """Seconds in which machines were held for the run."""
        return self.wall - sum(self.seconds.get(name, 0.0) for name in NOT_ALLOCATED)

    @property
    def goodput(self) -> float | None:
        """Share of the allocated time that made progress which was kept; None before any time has passed."""
        return self.seconds.get("training", 0.0) / self.allocated if self.allocated > 0 else None

    @property
    def groups(self) -> dict[str, float]:
        """As `seconds`, with the details of one thing together: `start-up`, `recovery`, ..."""
        totals: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self.seconds.items():
            totals[name.partition(":")[0]] += seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    @property
    def incidents(self) -> list[Span]:
        """The attempts that failed."""
        return [span for span in self.spans if span.name.startswith("attempt") and span.outcome in FAILED_ENDS]

    def cost(self, incident: Span) -> float:
        """Seconds that an incident cost: work done again, and all until the next attempt made its first step."""
        after = self.spans[self.spans.index(incident) :]
        seconds = incident.parts.get("lost work", 0.0) + _recovering(incident, ("detect", "tear down"))
        for span in after[1:]:
            if span.name.startswith("attempt"):
                return seconds + _recovering(span, ("import", "rendezvous", "engine", "load", "first step"))
            seconds += span.end - span.begin
        return seconds

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "wall": self.wall,
            "allocated": self.allocated,
            "goodput": self.goodput,
            "seconds": self.seconds,
            "spans": [asdict(span) for span in self.spans],
        }


def _recovering(span: Span, details: Sequence[str]) -> float:
    return sum(span.parts.get(f"recovery: {detail}", 0.0) for detail in details)


def account(events: Sequence[Mapping[str, Any]], running: Mapping[str, Any] | None = None) -> Account:
    """Account for a run's time.

    Args:
        events: the records of `events.jsonl`.
        running: the record of `ledger.json`, which stands for the end of an attempt that has none yet.
    """
    reader = _Reader()
    for event in events:
        reader.read(event)
    if running is not None and reader.is_of(running):
        reader.end_attempt({**running, "state": ""})
    return Account(tuple(reader.spans), tuple(reader.stragglers))


class _Reader:
    """Cuts the time into spans, event by event."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.stragglers: list[Mapping[str, Any]] = []
        self.open_attempt: int | None = None
        self._now: float | None = None
        self._state = ""
        self._facts: Mapping[str, Any] = {}
        self._failed_before = False

    def is_of(self, ledger: Mapping[str, Any]) -> bool:
        """Whether a ledger is that of the open attempt; each driver counts its attempts from 1."""
        return self.open_attempt == ledger["attempt"] and self._now is not None and ledger["time"] >= self._now

    def read(self, event: Mapping[str, Any]) -> None:
        state = event["state"]
        if state == RunState.STARTING:
            self._start(event)
        elif state == RunState.RUNNING:
            self._close_start(event["time"])
            self.open_attempt = event["attempt"]
        elif state in ATTEMPT_ENDS and self.open_attempt is not None:
            self.end_attempt(event)
        elif state in RECORDS:
            if state == STRAGGLER:
                self.stragglers.append(event)
            return
        elif state in (RunState.DRAINING, RunState.SAVING):
            return
        else:
            self._close_start(event["time"])
        self._state, self._facts = state, event

    def _span(self, end: float, name: str, parts: Mapping[str, float], outcome: str = "", **facts: Any) -> None:
        begin = end if self._now is None else self._now
        end = max(begin, end)  # a clock that was set back
        self.spans.append(Span(begin, end, name, outcome, facts, _fitted(parts, end - begin)))
        self._now = end

    def _start(self, event: Mapping[str, Any]) -> None:
        """A driver starts: what its job did before, and what lay before that."""
        moments = {**event.get("moments", {}), "driver": event.get("driver_started", event["time"])}
        known = [name for name in ("submitted", "started", "ray_head", "nodes_joined", "driver") if name in moments]
        if self._now is None:
            self._now = moments[known[0]]
        else:
            self._span(moments[known[0]], "between jobs", {"idle: between jobs": 0.0})
        for begin, end in pairwise(known):
            names = [name for first, last, name in JOB_MOMENTS if first == begin and last == end]
            name = names[0] if names else f"start-up: {end.replace('_', ' ')}"
            self._span(moments[end], name.partition(":")[0], {name: 0.0})
        self._span(event["time"], "start-up", {"start-up: data": 0.0})

    def _close_start(self, end: float) -> None:
        """What lies between two attempts, or before the first one."""
        if self._state in (RunState.RECOVERING, RunState.RESIZING):
            self._failed_before = True
            delay = float(self._facts.get("delay", 0.0))
            self._span(end, "recovery", {"recovery: worker group": 0.0, "recovery: back-off": delay})
        elif self._state == RunState.WAITING:
            self._span(end, "waiting for nodes", {"idle: waiting for nodes": 0.0})
        else:
            self._span(end, "start-up", {"start-up: worker group": 0.0})

    def end_attempt(self, event: Mapping[str, Any]) -> None:
        state = event["state"]
        facts = {name: value for name, value in event.items() if name not in ("time", "state", "ledger", "workers")}
        ledger = Ledger(**event["ledger"]) if event.get("ledger") else Ledger()
        ledger = ledger.going_back_to(event.get("kept_step", 0))
        parts = attempt_parts(
            ledger,
            lost=state != "",
            recovering=self._failed_before,
            teardown=float(event.get("teardown_seconds", 0.0)),
            rest="recovery: detect" if state in FAILED_ENDS else "idle: ending",
        )
        self._span(event["time"], f"attempt {event['attempt']}", parts, state, **facts)
        self._failed_before = state in FAILED_ENDS
        self.open_attempt = None


def attempt_parts(ledger: Ledger, *, lost: bool, recovering: bool, teardown: float, rest: str) -> dict[str, float]:
    """Seconds of one attempt by what they were spent on; the first one takes what is left of the attempt's span.

    Args:
        ledger: rank 0's.
        lost: whether what was done after the newest checkpoint is lost (it is not while the attempt runs).
        recovering: whether the attempt follows a failed one, so that its start belongs to the recovery.
        teardown: seconds that ending the workers took.
        rest: what the time is called that the ledger does not have.
    """
    spent, before = ledger.spent, ledger.spent_before_save
    start = "recovery" if recovering else "start-up"
    parts = {rest: 0.0, "recovery: tear down": teardown}
    for phase in START_PHASES:
        parts[f"{start}: {phase.value}"] = spent.get(phase.value, 0.0)
    stepping = sum(spent.get(phase.value, 0.0) for phase in STEP_PHASES)
    saved = sum(before.get(phase.value, 0.0) for phase in STEP_PHASES)
    once = _once(ledger, stepping)
    gone = max(0.0, stepping - saved - (once if saved == 0.0 else 0.0)) if lost else 0.0
    gone_evaluation = spent.get(Phase.EVALUATE, 0.0) - before.get(Phase.EVALUATE, 0.0) if lost else 0.0
    parts["recovery: first step" if recovering else "compile"] = once
    parts["training"] = stepping - once - gone
    parts["lost work"] = gone + gone_evaluation
    parts["evaluation"] = spent.get(Phase.EVALUATE, 0.0) - gone_evaluation
    parts["checkpoint"] = spent.get(Phase.SAVE, 0.0)
    parts["export"] = spent.get(Phase.EXPORT, 0.0)
    return {name: seconds for name, seconds in parts.items() if seconds > 0 or name == rest}


def _once(ledger: Ledger, stepping: float) -> float:
    """What the first step took beyond the others' mean: compilation, first allocations, connections."""
    others = ledger.steps_made - 1
    if others < 1:
        return 0.0
    return max(0.0, ledger.first_step_seconds - (stepping - ledger.first_step_seconds) / others)


def _fitted(parts: Mapping[str, float], whole: float) -> dict[str, float]:
    """Let the parts add up to the whole: the first one takes the rest, and if they are too much all shrink."""
    first, *others = parts
    known = sum(parts[name] for name in others)
    if known > whole:
        return {first: 0.0, **{name: parts[name] * whole / known for name in others}}
    return {**parts, first: whole - known}
