"""The state machine, stepped: the group and the clock are scripted here; real workers stand in test_run.py."""

import pytest

from launcher.errors import ResourceError
from launcher.orchestration.failure import FailureKind
from launcher.orchestration.states import GroupStatus, RunState
from launcher.orchestration.supervisor import ECHO_GRACE_S
from launcher.training.context import Phase
from tests.orchestration.stepped import COMPLETE, ECHO, Stepped, beat, broken, died, failure, results


def test_a_run_that_simply_completes() -> None:
    run = Stepped.over(GroupStatus(), COMPLETE)
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == ["start 1", "stop"]
    assert run.states == [RunState.RUNNING, RunState.COMPLETE]


def test_one_rank_returning_is_not_the_end() -> None:
    run = Stepped.over(GroupStatus(results={0: {"status": "complete", "step": 10}}), COMPLETE)
    run.supervisor.step()
    assert run.supervisor.step() is RunState.RUNNING
    assert run.supervisor.step() is RunState.COMPLETE


def test_a_failed_attempt_is_ended_and_started_again() -> None:
    run = Stepped.over(broken(died(1), saved_step=5), COMPLETE)
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == ["start 1", "stop", "start 2", "stop"]
    (facts,) = run.facts(RunState.RECOVERING)
    assert (facts["rank"], facts["node"], facts["step"], facts["saved_step"]) == (1, "n1", 7, 5)
    assert (facts["category"], facts["budget"], facts["restart"]) == ("infrastructure", "crash", 1)
    assert "signal 9" in facts["evidence"]
    assert run.clock.slept == [], "the first restart does not wait"


def test_a_state_in_memory_counts_where_it_is_newer_than_the_checkpoint() -> None:
    run = Stepped.over(broken(died(1), saved_step=5), COMPLETE)
    run.group.kept = 7
    assert run.run() is RunState.COMPLETE
    (facts,) = run.facts(RunState.RECOVERING)
    assert (facts["saved_step"], facts["kept_step"]) == (5, 7)
    older = Stepped.over(broken(died(1), saved_step=5), COMPLETE)
    older.group.kept = 5
    older.run()
    assert "kept_step" not in older.facts(RunState.RECOVERING)[0]


def test_the_budget_of_restarts_ends() -> None:
    run = Stepped.over(broken(died()), max_restarts=2, restart_delay_seconds=2)
    assert run.run() is RunState.FAILED
    assert run.group.calls == ["start 1", "stop", "start 2", "stop", "start 3", "stop"]
    assert run.events[-1][1]["reason"] == "2 of fault_tolerance.max_restarts 2 restarts are used up"
    assert 1.5 <= sum(run.clock.slept) <= 2.5, "none before the first restart, two seconds and jitter before the second"


def test_an_expected_error_is_not_retried() -> None:
    run = Stepped.over(broken(failure(0, "no such column", kind=FailureKind.EXPECTED)))
    assert run.run() is RunState.FAILED
    assert run.group.calls == ["start 1", "stop"]


def test_an_echo_waits_for_its_cause() -> None:
    echo = failure(0, ECHO, time=1.0)
    run = Stepped.over(broken(echo), broken(echo), broken(echo, died(1, time=2.0)), max_restarts=0)
    assert run.run() is RunState.FAILED
    assert run.events[-1][1]["rank"] == 1
    assert run.supervisor.failure_text.splitlines()[0].startswith("rank 1 on n1 failed at step 7 in phase forward")


def test_echoes_alone_do_not_wait_for_ever() -> None:
    run = Stepped.over(broken(failure(0, ECHO)), max_restarts=0)
    assert run.run() is RunState.FAILED
    assert run.clock.now < ECHO_GRACE_S + 3


def test_a_stop_request_reaches_the_workers_once_and_is_followed_to_the_save() -> None:
    saving = GroupStatus({0: beat(phase=Phase.SAVE)})
    run = Stepped.over(GroupStatus(), saving, saving, GroupStatus(results=results("stopped")))
    run.supervisor.step()
    run.supervisor.request_stop("Ctrl-C")
    run.supervisor.request_stop("again")
    assert run.supervisor.step() is RunState.DRAINING
    assert run.supervisor.step() is RunState.SAVING
    assert run.run() is RunState.STOPPED
    assert run.group.calls == ["start 1", "request_stop", "stop"]
    assert run.events[-1][1]["reason"] == "Ctrl-C"


def test_a_stop_request_before_the_start_starts_nothing() -> None:
    run = Stepped.over(GroupStatus())
    run.supervisor.request_stop()
    assert run.run() is RunState.STOPPED
    assert run.group.calls == []


def test_a_stop_request_does_not_wait_for_a_delay() -> None:
    run = Stepped.over(broken(died()), restart_delay_seconds=1000, max_restart_delay_seconds=1000)
    for _ in range(6):
        run.supervisor.step()
    assert run.supervisor.state is RunState.RECOVERING
    run.supervisor.request_stop()
    assert run.supervisor.step() is RunState.STOPPED
    assert run.clock.now < 10


def test_a_failure_while_stopping_is_not_retried() -> None:
    run = Stepped.over(GroupStatus(), broken(died()))
    run.supervisor.step()
    run.supervisor.request_stop()
    assert run.run() is RunState.FAILED
    assert "start 2" not in run.group.calls


def test_workers_that_do_not_save_within_the_grace_time_are_ended() -> None:
    run = Stepped.over(GroupStatus({0: beat(saved_step=40)}))
    run.supervisor.step()
    run.supervisor.request_stop("SIGTERM", grace_seconds=3)
    assert run.run() is RunState.STOPPED
    assert run.group.calls[-1] == "stop"
    assert 3 <= run.clock.now < 5
    assert run.events[-1][1]["step"] == 40
    assert "did not save in time, the newest checkpoint is that of step 40" in run.events[-1][1]["reason"]


def test_a_node_that_is_taken_before_its_grace_time_leaves_a_run_that_can_go_on() -> None:
    run = Stepped.over(GroupStatus(), broken(died(), saved_step=40))
    run.supervisor.step()
    run.supervisor.request_stop("SIGTERM", grace_seconds=30)
    assert run.run() is RunState.STOPPED
    assert run.events[-1][1]["saved_step"] == 40


def test_lost_nodes_are_waited_for() -> None:
    run = Stepped.over(broken(died()), COMPLETE)
    run.group.missing = [0, 1, 1, 1, 0]
    assert run.run() is RunState.COMPLETE
    assert run.states == [RunState.RUNNING, RunState.RECOVERING, RunState.WAITING, RunState.RUNNING, RunState.COMPLETE]
    assert run.facts(RunState.WAITING)[0]["missing_nodes"] == 1
    assert run.clock.slept == [5.0] * 3


def test_lost_nodes_are_not_waited_for_without_end() -> None:
    run = Stepped.over(broken(died()), wait_for_nodes_seconds=60)
    run.group.missing = [1] * 100
    assert run.run() is RunState.FAILED
    assert "1 node(s) are missing; waited fault_tolerance.wait_for_nodes_seconds 60" in run.events[-1][1]["reason"]
    assert 60 <= run.clock.now < 70


def test_a_restart_on_a_node_that_is_not_yet_known_to_be_gone_is_tried_again() -> None:
    run = Stepped.over(broken(died()), COMPLETE)
    run.group.starts = [None, ResourceError("other work holds them")]
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == ["start 1", "stop", "start 2", "start 2", "stop"]
    assert RunState.WAITING in run.states


def test_a_first_start_without_resources_is_the_profiles_mistake() -> None:
    run = Stepped.over(GroupStatus())
    run.group.starts = [ResourceError("the cluster has less")]
    with pytest.raises(ResourceError):
        run.supervisor.step()


def test_a_node_that_fails_again_and_again_is_left_out() -> None:
    run = Stepped.over(*(broken(died(node="n2"), saved_step=step) for step in (10, 20)), COMPLETE, exclude_node_after=2)
    assert run.run() is RunState.COMPLETE
    assert run.group.avoided == [(), (), ("n2",)]
    assert [facts.get("excluded") for facts in run.facts(RunState.RECOVERING)] == [None, ["n2"]]


def test_a_run_moves_away_from_a_node_that_is_about_to_be_taken() -> None:
    healthy = {0: beat(saved_step=5)}
    leaving = GroupStatus(healthy, leaving=("n2",))
    run = Stepped.over(leaving, leaving, GroupStatus({0: beat(saved_step=7)}, results=results("stopped")), COMPLETE)
    assert run.run() is RunState.COMPLETE
    assert run.states == [
        *(RunState.RUNNING, RunState.DRAINING, RunState.RECOVERING, RunState.RUNNING, RunState.COMPLETE)
    ]
    assert run.group.calls == ["start 1", "request_stop", "stop", "start 2", "stop"]
    assert run.group.avoided == [(), ("n2",)]
    (facts,) = run.facts(RunState.RECOVERING)
    assert (facts["category"], facts["budget"], facts["saved_step"]) == ("preemption", "preemption", 7)


def test_who_asks_to_stop_while_the_run_moves_is_heard() -> None:
    leaving = GroupStatus({0: beat()}, leaving=("n2",))
    run = Stepped.over(leaving, leaving, GroupStatus(results=results("stopped")))
    run.supervisor.step()
    run.supervisor.step()
    run.supervisor.request_stop("Ctrl-C")
    assert run.run() is RunState.STOPPED


def test_a_run_that_lost_a_node_goes_on_with_fewer_and_grows_after_a_save() -> None:
    def at(step: int) -> GroupStatus:
        return GroupStatus({0: beat(step=step, saved_step=step // 10 * 10)})

    stopped = GroupStatus({0: beat(step=43, saved_step=43)}, results=results("stopped"))
    run = Stepped.over(
        *(at(7), broken(died(), saved_step=10), at(12), at(15), at(21), at(31), at(42)),
        stopped,
        COMPLETE,
        resize_interval_seconds=1,
    )
    run.group.missing = [0, 1, 0, 0]
    run.group.sizes = [2, 2, 2, 3]
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == [
        *("start 1", "stop", "resize 2", "start 2", "request_stop", "stop", "resize 3", "start 3", "stop")
    ]
    assert run.states == [
        *(RunState.RUNNING, RunState.RECOVERING, RunState.RESIZING, RunState.RUNNING, RunState.DRAINING),
        *(RunState.RESIZING, RunState.RUNNING, RunState.COMPLETE),
    ]
    shrunk, grown = run.facts(RunState.RESIZING)
    assert (shrunk["nodes_before"], shrunk["nodes"], grown["nodes_before"], grown["nodes"]) == (3, 2, 2, 3)


def test_a_run_does_not_grow_more_often_than_the_recipe_says() -> None:
    growing = [GroupStatus({0: beat(step=10 * n, saved_step=10 * n)}) for n in range(1, 9)]
    run = Stepped.over(*growing, COMPLETE, resize_interval_seconds=1000)
    run.group.missing, run.group.sizes = [1, 0], [2, 3]
    assert run.run() is RunState.COMPLETE
    assert run.group.calls == ["resize 2", "start 1", "stop"]


def test_too_few_nodes_are_waited_for_even_by_an_elastic_run() -> None:
    run = Stepped.over(broken(died()), COMPLETE)
    run.group.missing = [0, 2, 2, 1]
    run.group.sizes = [None, None, 2]
    assert run.run() is RunState.COMPLETE
    assert run.states[2:5] == [RunState.WAITING, RunState.RESIZING, RunState.RUNNING]
