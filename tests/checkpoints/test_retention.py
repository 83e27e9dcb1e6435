"""Which checkpoints go and which stay, and that deleting them meets other people at the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.checkpoints import folders, retention
from launcher.checkpoints.retention import Candidate, to_prune
from launcher.recipe.run_sections import CheckpointSection

MakeCheckpoint = Callable[..., Path]


def kept(candidates: list[Candidate], **settings: object) -> list[int]:
    going = to_prune(candidates, CheckpointSection.model_validate(settings))
    return [candidate.step for candidate in candidates if candidate.step not in going]


STEPS = [Candidate(step) for step in range(10, 110, 10)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_total_limit": 1}, [100]),
        ({"save_total_limit": 3}, [80, 90, 100]),
        ({"save_total_limit": None}, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        ({"save_total_limit": 1, "keep_every": 40}, [40, 80, 100]),
        ({"save_total_limit": 20}, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
    ],
)
def test_the_newest_and_every_so_many(settings: dict[str, object], steps: list[int]) -> None:
    assert kept(STEPS, **settings) == steps


def test_the_best_are_those_of_lowest_loss_and_the_later_of_two_equal() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: None, 60: 5.0}
    candidates = [Candidate(step, loss) for step, loss in losses.items()]
    assert kept(candidates, save_total_limit=1, keep_best=1) == [40, 60]
    assert kept(candidates, save_total_limit=1, keep_best=2) == [20, 40, 60]
    assert kept(candidates, save_total_limit=1, keep_best=3) == [20, 30, 40, 60]


def test_a_pinned_one_stays() -> None:
    assert kept([Candidate(1, pinned=True), Candidate(2), Candidate(3)], save_total_limit=1) == [1, 3]


def test_the_newest_that_can_be_trusted_stays_beside_newer_damaged_ones() -> None:
    candidates = [Candidate(1), Candidate(2), Candidate(3, trusted=False), Candidate(4, trusted=False)]
    assert kept(candidates, save_total_limit=1) == [2, 4]


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        step=st.integers(1, 10**6),
        eval_loss=st.none() | st.floats(0, 10),
        pinned=st.booleans(),
        trusted=st.booleans(),
    ),
    unique_by=lambda candidate: candidate.step,
)


@given(CANDIDATES, st.integers(1, 5), st.none() | st.integers(1, 100), st.integers(0, 3))
def test_nothing_that_is_wanted_ever_goes(
    candidates: list[Candidate], limit: int, every: int | None, best: int
) -> None:
    section = CheckpointSection(save_total_limit=limit, keep_every=every, keep_best=best)
    going = set(to_prune(candidates, section))
    newest = sorted(candidate.step for candidate in candidates)[-limit:]
    trusted = [candidate.step for candidate in candidates if candidate.trusted]
    assert not going & {*newest, *([max(trusted)] if trusted else [])}
    assert not going & {candidate.step for candidate in candidates if candidate.pinned}
    left = [candidate for candidate in candidates if candidate.step not in going]
    assert to_prune(left, section) == [], "pruning again finds nothing to do"


def test_pruning_looks_at_the_files_and_takes_old_converted_forms(make_checkpoint: MakeCheckpoint) -> None:
    first, second, third, newest = (make_checkpoint(step, eval_loss=loss) for step, loss in
                                    [(1, 0.5), (2, 3.0), (3, None), (4, None)])  # fmt: skip
    (newest / "model.pt").write_bytes(b"")
    for folder in (first, newest):
        folders.universal_of(folder).mkdir()
    section = CheckpointSection(save_total_limit=1, keep_best=1)
    assert retention.prune(first.parent, section) == [second.name, folders.universal_of(first).name]
    assert folders.complete(first.parent) == [first, third, newest], "the third is the newest that has its sizes"
    retention.pin(third)
    make_checkpoint(5)
    assert retention.prune(first.parent, section) == [newest.name, folders.universal_of(newest).name]
    retention.unpin(third)
    assert retention.prune(first.parent, section) == [third.name]
    assert not retention.is_pinned(third)
