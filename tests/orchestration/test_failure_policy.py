"""What a failure means, and what the policy makes of it."""

from random import Random
from typing import Any

import pytest

from launcher.orchestration.failure import Category, Failure, FailureKind, classify, describe, first_cause
from launcher.orchestration.policy import FailurePolicy, GiveUp, Incident, Retry
from launcher.recipe.run_sections import FaultToleranceSection
from tests.orchestration.stepped import ECHO, died, failure

DIED = FailureKind.DIED


def incident(cause: Failure, *, started: bool = True, saved_step: int = 0) -> Incident:
    return Incident(cause, classify(cause), started, saved_step)


def policy(**settings: Any) -> FailurePolicy:
    return FailurePolicy(FaultToleranceSection(**settings), Random(3))


@pytest.mark.parametrize(
    ("cause", "category", "evidence"),
    [
        (died(), Category.INFRASTRUCTURE, "signal 9"),
        (failure(0, "gone: killed due to out of memory (OOM)", kind=DIED), Category.INFRASTRUCTURE, "host memory"),
        (failure(0, "gone: the node was preempted", kind=DIED), Category.PREEMPTION, "preempt"),
        (failure(0, "spot reclaim", kind=FailureKind.PREEMPTED), Category.PREEMPTION, "spot reclaim"),
        (
            failure(0, "RuntimeError: DefaultCPUAllocator: can't allocate memory"),
            Category.INFRASTRUCTURE,
            "host memory",
        ),
        (failure(0, "RuntimeError: CUDA error: uncorrectable ECC error"), Category.INFRASTRUCTURE, "GPU"),
        (failure(0, "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp"), Category.INFRASTRUCTURE, "NCCL"),
        (failure(0, ECHO), Category.INFRASTRUCTURE, "Connection closed by peer"),
        (failure(0, "RuntimeError: Timed out waiting 1800000ms for recv"), Category.HANG, "collective"),
        (failure(0, "OSError: [Errno 5] Input/output error"), Category.STORAGE, "[Errno 5]"),
        (failure(0, "disk full", kind=FailureKind.EXPECTED, exception="StorageError"), Category.STORAGE, "disk full"),
        (failure(0, "no such column", kind=FailureKind.EXPECTED), Category.USER, "no such column"),
        (failure(0, "loss is nan", kind=FailureKind.EXPECTED, exception="NumericError"), Category.NUMERIC, "nan"),
        (failure(0, "rank 0 stands still", kind=FailureKind.HUNG), Category.HANG, "stands still"),
        (failure(0, "KeyError: 'x'"), Category.ERROR, "'x'"),
    ],
)
def test_what_a_failure_means(cause: Failure, category: Category, evidence: str) -> None:
    verdict = classify(cause)
    assert verdict.category is category
    assert evidence in verdict.evidence


def test_the_same_exception_at_the_same_step_twice_is_a_user_error() -> None:
    decider = policy()
    assert isinstance(decider.decide(incident(failure(0, "IndexError: index 60000 at 0x7f1c"))), Retry)
    again = decider.decide(incident(failure(1, "IndexError: index 61234 at 0x7fff")))
    assert isinstance(again, GiveUp)
    assert "the same exception at the same step 7, twice" in again.reason


def test_the_same_exception_at_another_step_or_after_a_crash_is_tried_again() -> None:
    decider = policy()
    error = failure(0, "IndexError: x")
    assert isinstance(decider.decide(incident(error)), Retry)
    assert isinstance(decider.decide(incident(failure(0, "IndexError: x", step=8))), Retry)
    assert isinstance(decider.decide(incident(died())), Retry)


def test_a_new_checkpoint_refills_the_budget_of_crashes() -> None:
    decider = policy(max_restarts=2)
    numbers = []
    for saved_step in (0, 0, 10, 10, 20):
        decision = decider.decide(incident(died(), saved_step=saved_step))
        assert isinstance(decision, Retry)
        numbers.append(decision.number)
    assert numbers == [1, 2, 1, 2, 1]
    assert isinstance(decider.decide(incident(died(), saved_step=20)), Retry)
    last = decider.decide(incident(died(), saved_step=20))
    assert last == GiveUp("2 of fault_tolerance.max_restarts 2 restarts are used up since the checkpoint at step 20")


def test_failing_starts_have_a_budget_of_their_own() -> None:
    decider = policy(max_restarts=5, max_start_failures=1)
    assert decider.decide(incident(died(), started=False)) == Retry(1, "start", 0.0)
    assert decider.decide(incident(died())) == Retry(1, "crash", 0.0), "a step refills the budget of starts"
    assert isinstance(decider.decide(incident(died(), started=False)), Retry)
    last = decider.decide(incident(died(), started=False))
    assert last == GiveUp("1 of fault_tolerance.max_start_failures 1 restarts are used up")


def test_preemptions_use_up_nothing_and_do_not_wait() -> None:
    decider = policy(max_restarts=0, max_start_failures=0)
    taken = failure(0, "reclaimed", kind=FailureKind.PREEMPTED)
    assert [decider.decide(incident(taken)) for _ in range(3)] == [Retry(n, "preemption", 0.0) for n in (1, 2, 3)]
    assert isinstance(policy(max_preemptions=0).decide(incident(taken)), GiveUp)


def test_delays_double_up_to_their_limit_with_jitter() -> None:
    decider = policy(max_restarts=8, restart_delay_seconds=2, max_restart_delay_seconds=16)
    delays = []
    for _ in range(8):
        decision = decider.decide(incident(died()))
        assert isinstance(decision, Retry)
        delays.append(decision.delay_seconds)
    assert delays[0] == 0.0
    for delay, nominal in zip(delays[1:], (2, 4, 8, 16, 16, 16, 16), strict=True):
        assert 0.75 * nominal <= delay <= 1.25 * nominal
    assert len(set(delays[4:])) > 1, "many runs that failed together must not start together"


def test_only_machines_are_blamed() -> None:
    decider = policy(exclude_node_after=1, max_restarts=10)
    decider.decide(incident(failure(0, "KeyError: x", node="n1")))
    decider.decide(incident(failure(0, ECHO, node="n1")))
    decider.decide(incident(failure(0, "reclaimed", kind=FailureKind.PREEMPTED, node="n1")))
    assert decider.excluded == []
    decider.decide(incident(failure(0, "stands still", kind=FailureKind.HUNG, node="n2")))
    assert decider.excluded == ["n2"]


def test_the_first_cause_comes_before_echoes_and_later_failures() -> None:
    echo, early, late = failure(0, ECHO, time=0.0), failure(2, "KeyError", time=1.0), failure(1, "OSError", time=2.0)
    assert first_cause([echo, late, early]) is early
    text = describe([echo, late, early]).splitlines()
    assert text[0] == "rank 2 on n1 failed at step 7 in phase forward: KeyError"
    assert text[1] == "Traceback of rank 2"
    assert text[2].startswith("rank 0 then:")
    assert text[2].endswith("(follows from the first failure)")
    assert text[3] == "rank 1 then: OSError"


@pytest.mark.parametrize(("exception", "answer"), [("NumericError", Retry), ("BadLossesError", GiveUp)])
def test_a_run_that_left_out_what_it_may_does_not_go_back_to_leave_out_more(exception: str, answer: type) -> None:
    cause = failure(0, "the loss of step 7 is nan", kind=FailureKind.EXPECTED, exception=exception)
    decision = policy(on_bad_loss="skip").decide(incident(cause))
    assert isinstance(decision, answer)
    if isinstance(decision, GiveUp):
        assert "max_bad_losses 10 batches are left out already" in decision.reason
