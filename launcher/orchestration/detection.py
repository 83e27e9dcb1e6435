"""Finding ranks that stand still and ranks that are slow, from heartbeats alone. Pure: no ray, no torch."""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.recipe.run_sections import FaultToleranceSection
from launcher.training.context import STEP_PHASES, Beat, Phase

MIN_HANG_S = 30.0
HANG_STEPS = 5
"""Without a bound in the recipe, no progress for max(`MIN_HANG_S`, `HANG_STEPS` median steps) is a hang."""
MIN_STEPS = 3
"""Steps that must have been seen before their median counts; the first ones compile and connect."""
SILENT_S = 5.0
"""A worker that did not answer for so long is silent; each one is asked about once a second."""
STRAGGLER_LOOKS = 2
"""Looks in a row at which a rank must be slow: many short steps may lie between two, and one pause in one of them."""
STRAGGLER_SHARE = 0.1
"""A slow rank is named only if it costs the others at least this share of a step."""
OWN_PHASES = (Phase.DATA, Phase.FORWARD)
"""What a rank does without waiting for the others (under ZeRO 3 the forward pass waits, and only the data does not)."""
DOING = {
    Phase.DATA: "data loading",
    Phase.OPTIMIZER: "the optimizer",
    Phase.AGREE: "agreeing on the batch",
    Phase.EVALUATE: "evaluation",
    Phase.SAVE: "saving",
    Phase.LOAD: "loading",
    Phase.IMPORT: "importing",
    Phase.ENGINE: "building the engine",
}


def doing(phase: Phase) -> str:
    """A phase as a part of a sentence."""
    return DOING.get(phase, phase.value)


@dataclass(frozen=True)
class Suspect:
    """A rank that the others wait for."""

    rank: int
    node: str
    phase: Phase
    step: int
    seconds: float
    silent: bool

    def __str__(self) -> str:
        silent = " and does not answer" if self.silent else ""
        return (
            f"rank {self.rank} on node {self.node} has been in {doing(self.phase)} at step {self.step} "
            f"for {self.seconds:.0f} s{silent}"
        )


@dataclass(frozen=True)
class Hang:
    """A group that stands still.

    Attributes:
        suspects: whom the others wait for; all ranks when nobody is behind.
        waiting: number of the other ranks by what they are in.
        bound: seconds without progress that were allowed.
    """

    suspects: Sequence[Suspect]
    waiting: Mapping[Phase, int]
    bound: float

    def __str__(self) -> str:
        if not self.waiting and len(self.suspects) > 1 and not any(suspect.silent for suspect in self.suspects):
            first = self.suspects[0]
            return (
                f"all {len(self.suspects)} ranks have been in {doing(first.phase)} at step {first.step} "
                f"for {first.seconds:.0f} s, and none is behind: look at the network between them"
            )
        text = "; ".join(map(str, self.suspects))
        waits = [
            f"{count} rank{'s wait' if count > 1 else ' waits'} in {doing(phase)}"
            for phase, count in self.waiting.items()
        ]
        return "; ".join([text, *waits])


@dataclass
class HangDetector:
    """Notices that a group makes no progress, and says whom it waits for.

    All ranks do the same things in the same order and wait for each other at least once a step. So a group in which
    one rank stands still soon stands still as a whole, and that rank is the one with the least progress.

    Attributes:
        settings: of the recipe.
        node_of: host name of a rank's node.
    """

    settings: FaultToleranceSection
    node_of: Callable[[int], str]
    _progress: dict[int, tuple[int, float]] = field(default_factory=dict)
    _answered: dict[int, tuple[float, float]] = field(default_factory=dict)
    _steps: "deque[float]" = field(default_factory=lambda: deque(maxlen=51))
    _last_step: tuple[int, float] | None = None

    def reset(self) -> None:
        """Forget the attempt that has ended."""
        self._progress, self._answered, self._last_step = {}, {}, None
        self._steps.clear()

    def look(self, now: float, beats: Mapping[int, Beat]) -> Hang | None:
        """Take one look at an attempt's heartbeats.

        Args:
            now: seconds, on any clock that all looks share.
            beats: newest heartbeat by rank.
        """
        for rank, beat in beats.items():
            if self._progress.get(rank, (-1, 0.0))[0] != beat.progress:
                self._progress[rank] = beat.progress, now
            if self._answered.get(rank, (-1.0, 0.0))[0] != beat.time:
                self._answered[rank] = beat.time, now
        if not beats:
            return None
        self._note_step(now, max(beat.step for beat in beats.values()))
        still = now - max(moment for _, moment in self._progress.values())
        silent = {rank for rank, (_, moment) in self._answered.items() if now - moment >= SILENT_S}
        least = min(beat.progress for beat in beats.values())
        behind = silent or {rank for rank, beat in beats.items() if beat.progress == least}
        # What a silent rank said last may be long out of date; those who wait for it know better what it is about.
        witnesses = (set(beats) - silent or silent) if silent else behind
        bound = self._bound([beats[rank] for rank in witnesses])
        if still < bound:
            return None
        suspects = [self._suspect(beats[rank], now, silent=rank in silent) for rank in sorted(behind)]
        waiting: defaultdict[Phase, int] = defaultdict(int)
        for rank, beat in beats.items():
            if rank not in behind:
                waiting[beat.phase] += 1
        return Hang(suspects, dict(waiting), bound)

    def _note_step(self, now: float, step: int) -> None:
        if self._last_step is not None and step > self._last_step[0]:
            self._steps.append((now - self._last_step[1]) / (step - self._last_step[0]))
        if self._last_step is None or step != self._last_step[0]:
            self._last_step = step, now

    def _bound(self, witnesses: Sequence[Beat]) -> float:
        if not all(beat.phase in STEP_PHASES and beat.steps_made >= MIN_STEPS for beat in witnesses):
            return self.settings.stall_seconds
        if self.settings.hang_seconds is not None:
            return self.settings.hang_seconds
        # Short steps may all lie between two looks; then the first one, which was the slowest, stands for them.
        usual = statistics.median(self._steps) if self._steps else max(beat.first_step_seconds for beat in witnesses)
        return max(MIN_HANG_S, HANG_STEPS * usual)

    def _suspect(self, beat: Beat, now: float, *, silent: bool) -> Suspect:
        seconds = now - self._progress[beat.rank][1]
        return Suspect(beat.rank, self.node_of(beat.rank), beat.phase, beat.step, seconds, silent)


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others.

    Attributes:
        rank: of the worker.
        node: host name of its node.
        factor: its time for data and forward pass, relative to the other ranks' median.
        step: at which it was noticed.
        steps: in a row in which it was that slow.
    """

    rank: int
    node: str
    factor: float
    step: int
    steps: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on node {self.node} is a straggler: {self.factor:.1f} x the other ranks' median time "
            f"for data and forward pass over the last {self.steps} steps, at step {self.step}"
        )


@dataclass
class StragglerDetector:
    """Notices ranks that are slower than the others by a bound for so many steps in a row; each one once an attempt."""

    settings: FaultToleranceSection
    node_of: Callable[[int], str]
    _last: dict[int, Beat] = field(default_factory=dict)
    _slow: dict[int, tuple[int, int]] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)

    def reset(self) -> None:
        """Forget the attempt that has ended."""
        self._last, self._slow = {}, {}
        self._named.clear()

    def look(self, beats: Mapping[int, Beat]) -> list[Straggler]:
        """Take one look at an attempt's heartbeats; returns those that are newly found."""
        if len(beats) < 2 or any(beat.steps_made < MIN_STEPS for beat in beats.values()):
            return []
        last, known = self._last, len(self._last) == len(beats)
        if known and any(beat.steps_made <= last[rank].steps_made for rank, beat in beats.items()):
            return []  # wait until every rank has made a step since the last look
        self._last = dict(beats)
        if not known:
            return []
        own = {rank: _per_step(beat, last[rank], OWN_PHASES) for rank, beat in beats.items()}
        step_seconds = statistics.median(_per_step(beat, last[rank], STEP_PHASES) for rank, beat in beats.items())
        found = []
        for rank, beat in beats.items():
            others = statistics.median(seconds for other, seconds in own.items() if other != rank)
            costs = own[rank] - others >= STRAGGLER_SHARE * step_seconds
            if not costs or own[rank] < self.settings.straggler_factor * others:
                self._slow[rank] = 0, 0
                continue
            steps, looks = self._slow.get(rank, (0, 0))
            steps, looks = steps + beat.steps_made - last[rank].steps_made, looks + 1
            self._slow[rank] = steps, looks
            lasts = steps >= self.settings.straggler_steps and looks >= STRAGGLER_LOOKS
            if lasts and rank not in self._named:
                self._named.add(rank)
                factor = own[rank] / others if others > 0 else float("inf")
                found.append(Straggler(rank, self.node_of(rank), factor, beat.step, steps))
        return found


def _per_step(beat: Beat, last: Beat, phases: Sequence[Phase]) -> float:
    """Seconds a step in some phases, since an earlier heartbeat."""
    spent = sum(beat.spent.get(phase.value, 0.0) - last.spent.get(phase.value, 0.0) for phase in phases)
    return spent / (beat.steps_made - last.steps_made)
