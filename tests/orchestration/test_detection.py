"""Hangs and stragglers, found in the heartbeats of a simulated group; real stopped and slow ranks in test_faults.py."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from launcher.orchestration.detection import Hang, HangDetector, Straggler, StragglerDetector
from launcher.orchestration.states import GroupStatus, RunState
from launcher.recipe.run_sections import FaultToleranceSection
from launcher.training.context import Beat, Phase
from tests.orchestration.stepped import COMPLETE, Stepped


def node_of(rank: int) -> str:
    return f"n{rank // 8 + 1}"


def beat(rank: int, progress: int, phase: Phase, *, step: int = 412, time: float = 0.0, made: int = 400) -> Beat:
    return Beat(rank, step, phase, 0.0, {}, 1000, {}, time=time, progress=progress, steps_made=made)


def watch(beats: Callable[[float], dict[int, Beat]], seconds: int, **settings: Any) -> tuple[int, Hang] | None:
    """Look once a second at a group whose heartbeats are a function of the time."""
    detector = HangDetector(FaultToleranceSection(**settings), node_of)
    for now in range(seconds):
        hang = detector.look(float(now), beats(float(now)))
        if hang is not None:
            return now, hang
    return None


def training_until(moment: float, step_seconds: float, then: Callable[[float, int], dict[int, Beat]], ranks: int = 32):
    """A group that trains, and then does something else: `then(now, progress of a healthy rank)`."""

    def beats(now: float) -> dict[int, Beat]:
        made = int(min(now, moment) / step_seconds)
        if now < moment:
            return {rank: beat(rank, 5 * made, Phase.BACKWARD, step=made, time=now, made=made) for rank in range(ranks)}
        return then(now, 5 * made)

    return beats


def test_a_rank_that_stands_still_is_named_with_what_the_others_do() -> None:
    def stuck(now: float, progress: int) -> dict[int, Beat]:
        others = {rank: beat(rank, progress + 3, Phase.BACKWARD, time=now) for rank in range(32)}
        return {**others, 13: beat(13, progress + 1, Phase.DATA, time=now)}

    found = watch(training_until(100, 2.0, stuck), 200)
    assert found is not None
    now, hang = found
    assert now == 130
    text = "rank 13 on node n2 has been in data loading at step 412 for 30 s; 31 ranks wait in backward"
    assert str(hang) == text


def test_the_bound_follows_the_steps_or_the_recipe() -> None:
    def stuck(now: float, progress: int) -> dict[int, Beat]:
        return {rank: beat(rank, progress, Phase.FORWARD, time=now) for rank in range(4)}

    slow = watch(training_until(600, 20.0, stuck, ranks=4), 1000)
    assert slow is not None
    assert slow[0] - 600 in range(80, 101), "5 steps of 20 s after the last progress"
    told = watch(training_until(600, 20.0, stuck, ranks=4), 1000, hang_seconds=45)
    assert told is not None
    assert told[0] < slow[0]
    assert "all 4 ranks have been in forward at step 412" in str(told[1])


def test_two_that_do_not_answer_are_both_named() -> None:
    def stopped(now: float, progress: int) -> dict[int, Beat]:
        others = {rank: beat(rank, progress + 3, Phase.AGREE, time=now) for rank in range(8)}
        return {
            **others,
            2: beat(2, progress + 2, Phase.FORWARD, time=100.0),
            5: beat(5, progress + 1, Phase.DATA, time=100.0),
        }

    found = watch(training_until(100, 1.0, stopped, ranks=8), 200)
    assert found is not None
    assert [suspect.rank for suspect in found[1].suspects] == [2, 5]
    assert str(found[1]).endswith("does not answer; 6 ranks wait in agreeing on the batch")


def test_what_a_silent_rank_said_last_is_no_excuse() -> None:
    def stopped(now: float) -> dict[int, Beat]:
        late = beat(1, 3, Phase.ENGINE, time=0.0, step=0, made=0)
        return {0: beat(0, 61, Phase.AGREE, time=now, made=12), 1: late}

    found = watch(stopped, 100)
    assert found is not None
    assert found[0] == 30
    assert [suspect.rank for suspect in found[1].suspects] == [1]


def test_a_long_start_and_a_long_save_are_no_hang() -> None:
    def saving(now: float, progress: int) -> dict[int, Beat]:
        return {rank: beat(rank, progress, Phase.SAVE, time=now) for rank in range(4)}

    assert watch(training_until(100, 1.0, saving, ranks=4), 1800) is None
    found = watch(training_until(100, 1.0, saving, ranks=4), 2000)
    assert found is not None
    assert found[0] == 1900, "fault_tolerance.stall_seconds after the last progress"

    def compiling(now: float) -> dict[int, Beat]:
        return {rank: beat(rank, 9, Phase.FORWARD, time=now, made=0) for rank in range(4)}

    assert watch(compiling, 1700) is None


def test_steps_that_nobody_saw_are_steps() -> None:
    def stuck(now: float) -> dict[int, Beat]:
        return {rank: beat(rank, 61 + rank, Phase.DATA, time=now, made=12) for rank in range(2)}

    found = watch(stuck, 100)
    assert found is not None
    assert found[0] == 30, "all twelve were made before the first look"


class SimulatedGroup:
    """Ranks that compute for as long as they are told to and wait for each other; seen once a second."""

    def __init__(self, ranks: int, own_seconds: Callable[[int, int], float], *, extra: Callable[[int], float]) -> None:
        self.ranks = ranks
        self.own_seconds = own_seconds
        self.extra = extra

    def looks(self, steps: int) -> Iterator[tuple[float, dict[int, Beat]]]:
        now, next_look = 0.0, 1.0
        spent = [{"data": 0.0, "forward": 0.0, "agree": 0.0, "backward": 0.0} for _ in range(self.ranks)]
        for step in range(1, steps + 1):
            own = [self.own_seconds(rank, step) for rank in range(self.ranks)]
            length = max(own) * 3 + self.extra(step)
            for rank in range(self.ranks):
                spent[rank]["data"] += own[rank] * 0.2
                spent[rank]["forward"] += own[rank] * 0.8
                spent[rank]["agree"] += max(own) - own[rank]
                spent[rank]["backward"] += 2 * max(own)
            beats = {
                rank: Beat(
                    rank, step, Phase.BACKWARD, 0.0, {}, steps, {},
                    progress=6 * step, steps_made=step, spent=dict(spent[rank]),
                )
                for rank in range(self.ranks)
            }  # fmt: skip
            now += length
            while next_look < now:
                yield next_look, {rank: _at(beat, next_look) for rank, beat in beats.items()}
                next_look += 1.0


def _at(beat: Beat, now: float) -> Beat:
    from dataclasses import replace

    return replace(beat, time=now)


def test_no_false_alarm_in_two_thousand_jittery_steps() -> None:
    random = Random(5)

    def own(rank: int, step: int) -> float:
        pause = 1.5 if random.random() < 0.002 else 0.0  # a garbage collection, a slow disk
        return random.lognormvariate(-1.2, 0.35) + pause

    def extra(step: int) -> float:
        return 25.0 if step % 100 == 0 else 0.0  # evaluation and a checkpoint

    settings = FaultToleranceSection()
    hangs, stragglers = HangDetector(settings, node_of), StragglerDetector(settings, node_of)
    looks = 0
    for now, beats in SimulatedGroup(8, own, extra=extra).looks(2000):
        looks += 1
        assert hangs.look(now, beats) is None
        assert stragglers.look(beats) == []
    assert looks > 2000


def test_a_rank_slowed_by_three_is_named_within_twenty_steps_and_once() -> None:
    random = Random(6)

    def own(rank: int, step: int) -> float:
        return random.lognormvariate(-1.2, 0.1) * (3.0 if rank == 5 and step > 200 else 1.0)

    for ranks in (2, 8):
        slow = min(5, ranks - 1)
        detector = StragglerDetector(FaultToleranceSection(), node_of)
        group = SimulatedGroup(
            ranks, lambda rank, step, slow=slow: own(5 if rank == slow else 0, step), extra=lambda step: 0.0
        )
        found: list[Straggler] = []
        for _, beats in group.looks(400):
            found += detector.look(beats)
        (straggler,) = found
        assert straggler.rank == slow
        assert 200 < straggler.step <= 220
        assert 2 < straggler.factor < 4


def test_a_slow_rank_that_costs_next_to_nothing_is_not_named() -> None:
    def own(rank: int, step: int) -> float:
        return 0.003 if rank == 0 else 0.001

    detector = StragglerDetector(FaultToleranceSection(), node_of)
    group = SimulatedGroup(4, own, extra=lambda step: 0.0)
    for _, beats in group.looks(5000):
        longer = {
            rank: Beat(rank, b.step, b.phase, 0.0, {}, 9, {}, progress=b.progress, steps_made=b.steps_made,
                       spent={**b.spent, "optimizer": 0.1 * b.steps_made})
            for rank, b in beats.items()
        }  # fmt: skip
        assert detector.look(longer) == []


def test_the_supervisor_ends_a_hang_keeps_its_stacks_and_starts_again() -> None:
    still = GroupStatus({rank: beat(rank, 7 + rank, Phase.FORWARD, time=0.0) for rank in (0, 1)})
    run = Stepped.over(
        GroupStatus({rank: beat(rank, 1, Phase.FORWARD, time=0.0, step=411) for rank in (0, 1)}),
        *[still] * 12,
        COMPLETE,
        hang_seconds=5,
    )
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == ["start 1", "examine", "stop", "start 2", "stop"]
    (facts,) = run.facts(RunState.RECOVERING)
    assert (facts["category"], facts["rank"], facts["node"]) == ("hang", 0, "n0")
    assert run.supervisor.failure_text.startswith("rank 0 on node n0 has been in forward at step 412 for 5 s")
    assert run.supervisor.failure_text.endswith("stacks: here")
