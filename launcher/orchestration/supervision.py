"""A run's supervisor and real workers, put together, and what a person or a scheduler may ask of them meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.types import STOP_FILE_VARIABLE
from launcher.checkpoints import fault_plan
from launcher.orchestration.elastic import Elastic
from launcher.orchestration.journal import Journal
from launcher.orchestration.observers import Notices, Observer
from launcher.orchestration.policy import FailurePolicy
from launcher.orchestration.states import RunState
from launcher.orchestration.supervisor import Supervisor
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory

NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm, Kubernetes and clouds send some time before they take a machine away."""
SIGNAL_ECHO_S = 2.0
"""A second SIGTERM this soon is the first one by another way: Slurm may send it to every process of a job."""


def supervise(
    plan: Plan,
    run_directory: RunDirectory,
    observer: Observer,
    journal: Journal,
    saved_step: int,
) -> Supervisor:
    """Step a supervisor to the end of the run, and pass on what it sees and what it is asked from outside.

    Args:
        plan: of the run, with all its nodes.
        run_directory: of the run.
        observer: told what happens.
        journal: where it is written down.
        saved_step: of the newest checkpoint, 0 without one.

    Returns:
        The supervisor in its final state.
    """
    from launcher.orchestration.placing import GroupShape
    from launcher.orchestration.worker_group import WorkerGroup

    shape = GroupShape(
        nodes=plan.resources.nodes,
        workers_per_node=plan.resources.workers_per_node,
        cpus_per_worker=plan.resources.cpus_per_worker,
        device=plan.resources.device,
        environment={name: os.environ[name] for name in plan.resources.environment_names if name in os.environ}
        | fault_plan.environment(),
        warm=plan.resources.device == "cpu" and plan.recipe.fault_tolerance.warm_workers,
        warm_after_seconds=plan.recipe.fault_tolerance.warm_workers_after_seconds,
        memory_per_worker=plan.resources.memory_per_worker,
        memory=plan.recipe.fault_tolerance.memory_checkpoint is not None,
    )
    elastic = Elastic(plan, run_directory) if plan.resources.min_nodes is not None else None
    group = WorkerGroup(run_directory, shape, elastic)
    policy = FailurePolicy(plan.recipe.fault_tolerance)

    def on_event(state: RunState, facts: dict[str, Any]) -> None:
        if state is RunState.RUNNING:
            facts = {**facts, "workers": [_whereabouts(rank, place) for rank, place in enumerate(group.placements)]}
        journal.look(supervisor.status)
        journal.event(state, facts)
        if state in (RunState.RECOVERING, RunState.FAILED) and supervisor.failure_text:
            observer.message(supervisor.failure_text)

    supervisor = Supervisor(
        group, policy, time.monotonic, time.sleep, on_event, saved_step, on_straggler=journal.straggler
    )
    try:
        with _interrupts(supervisor, observer, plan.recipe.fault_tolerance.save_before_end_seconds):
            stop_file = os.environ.get(STOP_FILE_VARIABLE)
            grace = plan.recipe.fault_tolerance.save_before_end_seconds
            notices = Notices(observer)
            while not supervisor.step().is_final:
                notices.show(supervisor.attempt, supervisor.status)
                observer.progress(supervisor.status)
                journal.look(supervisor.status)
                if stop_file is not None and Path(stop_file).exists():
                    supervisor.request_stop("the job's time is over, or it was asked to stop", grace)
            notices.show(supervisor.attempt, supervisor.status)
            observer.progress(supervisor.status)
    finally:
        group.close()
    return supervisor


def _whereabouts(rank: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Where a rank runs, for people and for tools that look at processes."""
    return {"rank": rank, "hostname": facts["hostname"], "address": facts["address"], "pid": facts["pid"]}


@contextmanager
def _interrupts(supervisor: Supervisor, observer: Observer, grace_seconds: float) -> Iterator[None]:
    """First Ctrl-C or notice: save and end at the next step. Second Ctrl-C or SIGTERM: end at once.

    SIGTERM, SIGUSR1 and SIGUSR2 announce that the machine will be taken away; so what is not saved within the grace
    time is given up, and the run goes on later from what is.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = signal.Signals(number).name
        if first is not None:
            if number in NOTICES and (number != signal.SIGTERM or time.monotonic() - first < SIGNAL_ECHO_S):
                return
            raise KeyboardInterrupt
        first = time.monotonic()
        supervisor.request_stop(name, grace_seconds if number in NOTICES else None)
        observer.message(f"{name}: stopping; the workers save after this step (interrupt again to end at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *NOTICES)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
