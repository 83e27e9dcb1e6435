"""The driver: brings the run in a run directory to its end on the Ray cluster in RAY_ADDRESS.

Replay any job by hand: ``RAY_ADDRESS=... python -m launcher.orchestration.driver RUN_DIR``.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cluster.types import NODE_TIMEOUT_VARIABLE, PHASES_VARIABLE
from launcher.checkpoints import folders
from launcher.checkpoints.manifest import read_manifest
from launcher.checkpoints.remote import RemoteCheckpoints, fetch_newest
from launcher.checkpoints.resumable import check_resumable, recipe_changes, with_batch_of
from launcher.errors import ExpectedError, ResourceError, RunDirectoryError, TrainingError
from launcher.orchestration.connecting import connect
from launcher.orchestration.failure import FailureKind
from launcher.orchestration.journal import Journal
from launcher.orchestration.mirror import Mirror
from launcher.orchestration.observers import JobObserver, Observer
from launcher.orchestration.run_lock import holding
from launcher.orchestration.states import RunState
from launcher.orchestration.supervision import supervise
from launcher.orchestration.supervisor import Supervisor
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, write_atomically


def read_plan(run_directory: RunDirectory) -> Plan:
    """Read the plan that a run directory holds.

    Raises:
        RunDirectoryError: there is none, or another version wrote it.
    """
    try:
        return Plan.model_validate_json(run_directory.plan.read_bytes())
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{run_directory.path} holds no plan.json: it is no run directory") from error
    except ValueError as error:
        raise RunDirectoryError(
            f"{run_directory.plan} cannot be read by this version; start the run again with its recipe: {error}"
        ) from error


def completed_summary(run_directory: RunDirectory, plan: Plan) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do under this plan, or None.

    A plan whose model or data are not those of the newest checkpoint has everything left to do, and will be refused.
    """
    if not run_directory.summary.exists():
        return None
    saved = folders.complete(run_directory.checkpoints)
    if saved and recipe_changes(read_manifest(saved[-1]), plan):
        return None
    summary: dict[str, Any] = json.loads(run_directory.summary.read_text())
    training = plan.recipe.training
    wanted = {"max_steps": training.max_steps, "num_train_epochs": training.num_train_epochs}
    return summary if summary["length"] == wanted else None


def drive(
    run_directory: RunDirectory,
    observer: Observer,
    check_alive: Callable[[], None] = lambda: None,
    moments: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Prepare data, connect, supervise; returns the summary.

    Args:
        run_directory: of the run.
        observer: told what happens.
        check_alive: raises when the cluster's head is known to have ended.
        moments: Unix times of what came before: `submitted`, `started`, `ray_head`, `nodes_joined`.

    Raises:
        ExpectedError: what a person must change; `TrainingError` holds the failing rank's traceback.
    """
    plan = _whole_plan(run_directory)
    remote = _remote(plan, run_directory, observer)
    plan = _keep_batch(plan, run_directory, observer)
    started = time.time()

    journal = Journal(run_directory, observer, tensorboard=plan.recipe.logging.tensorboard)
    prepared = _prepare(plan, run_directory, observer)
    saved_step = _check_checkpoint(plan, run_directory, prepared.fingerprint, observer)
    journal.starting(moments or {}, {"seconds_to_prepare": round(time.time() - started, 2)})
    connect(check_alive)
    if plan.resources.nodes > 1:
        observer.message(node_loss_bound())
    if plan.resources.nodes > 1 and plan.recipe.fault_tolerance.preflight:
        _preflight(plan, run_directory, observer)
    try:
        with _mirroring(remote, plan, run_directory, observer):
            supervisor = supervise(plan, run_directory, observer, journal, saved_step)
    finally:
        journal.close()
    if supervisor.state is RunState.FAILED:
        cause = supervisor.cause
        if cause is not None and cause.kind is FailureKind.EXPECTED:
            raise TrainingError(cause.message)
        raise TrainingError(f"{supervisor.failure_text}\nThe run is not restarted. Logs: {run_directory.logs}")
    result = supervisor.status.results[0] if supervisor.status.results else {}
    timeline = supervisor.status.beats[0].timeline if 0 in supervisor.status.beats else {}
    summary = _summary(plan, run_directory, supervisor, result, started, timeline, prepared)
    if supervisor.state is RunState.COMPLETE:
        write_atomically(run_directory.summary, json.dumps(summary, indent=1))
    return summary


def node_loss_bound() -> str:
    """Within what time the loss of a node is known, for people."""
    bound = os.environ.get(NODE_TIMEOUT_VARIABLE)
    if bound is None:
        return (
            "this Ray cluster's own health checks say when a node is gone; fault_tolerance.node_timeout_seconds holds "
            "for clusters that ZeroFleet starts"
        )
    return f"a node that dies or is cut off is known to be gone within {bound} s (fault_tolerance.node_timeout_seconds)"


def _prepare(plan: Plan, run_directory: RunDirectory, observer: Observer) -> Any:
    from launcher.data.prepare import prepare

    prepared = prepare(plan.recipe, progress=sys.stderr.isatty())
    write_atomically(
        run_directory.data,
        json.dumps(
            {
                "directory": str(prepared.directory),
                "fingerprint": prepared.fingerprint,
                "tokenizer_directory": str(prepared.tokenizer_directory),
            },
            indent=1,
        ),
    )
    if not sys.stderr.isatty():  # the progress bar has said them
        for note in prepared.statistics.get("notes", []):
            observer.message(note)
    return prepared


def _whole_plan(run_directory: RunDirectory) -> Plan:
    """The plan with all nodes; a driver before this one may have gone on with fewer."""
    if run_directory.full_plan.exists():
        write_atomically(run_directory.plan, run_directory.full_plan.read_text())
        run_directory.full_plan.unlink()
    return read_plan(run_directory)


def _remote(plan: Plan, run_directory: RunDirectory, observer: Observer) -> RemoteCheckpoints | None:
    """The second place for checkpoints, if the recipe names one; what is newer there is fetched."""
    url = plan.recipe.checkpoint.directory
    if url is None:
        return None
    remote = RemoteCheckpoints(url)
    fetch_newest(remote, run_directory.checkpoints, observer.message)
    return remote


@contextmanager
def _mirroring(
    remote: RemoteCheckpoints | None, plan: Plan, run_directory: RunDirectory, observer: Observer
) -> Iterator[None]:
    """Copy checkpoints to the second place, if there is one, and leave when all are there."""
    if remote is None:
        yield
        return
    with Mirror(remote, run_directory.checkpoints, plan.recipe.checkpoint, observer.message):
        yield


def _keep_batch(plan: Plan, run_directory: RunDirectory, observer: Observer) -> Plan:
    """Let a run that resumes on another number of workers keep its global batch; the workers read the plan anew."""
    newest = folders.newest_of_full_size(run_directory.checkpoints)
    if newest is None:
        return plan
    kept = with_batch_of(read_manifest(newest), plan)
    if kept is not plan:
        write_atomically(run_directory.plan, kept.model_dump_json(indent=1))
        write_atomically(run_directory.deepspeed, json.dumps(kept.deepspeed_config, indent=2) + "\n")
        observer.message(
            f"keeping the checkpoint's global batch of {kept.batch.global_batch_size} samples: micro batch "
            f"{kept.batch.micro_batch_size} x accumulation {kept.batch.gradient_accumulation_steps} x data-parallel "
            f"{kept.layout.data_parallel_size}"
        )
    return kept


def _check_checkpoint(plan: Plan, run_directory: RunDirectory, fingerprint: str, observer: Observer) -> int:
    """Before any worker starts: tidy up after interrupted saves, refuse a checkpoint of another recipe.

    Here only sizes are compared; the workers compare checksums, each of a part of the files.
    """
    for note in folders.tidy(run_directory.checkpoints):
        observer.message(note)
    folder = folders.newest_of_full_size(run_directory.checkpoints)
    if folder is not None:
        resumption = check_resumable(read_manifest(folder), plan, fingerprint, folder)
        observer.message(f"resuming from {folder.name}")
        if resumption.differences:
            observer.message(f"it will be converted: {'; '.join(resumption.differences)}")
        return folders.step_of(folder)
    return 0


def _preflight(plan: Plan, run_directory: RunDirectory, observer: Observer) -> None:
    """Examine the nodes before a run trusts them.

    Raises:
        ResourceError: a run would fail on them.
    """
    from launcher.orchestration.doctor import examine

    resources = plan.resources
    gpus = resources.workers_per_node if resources.device == "cuda" else 0
    found = examine(run_directory.path, resources.min_nodes or resources.nodes, gpus_per_node=gpus)
    for finding in found.findings:
        observer.message(f"preflight: {finding}")
    errors = [str(finding) for finding in found.findings if finding.level == "error"]
    if errors:
        raise ResourceError("\n".join([*errors, "(fault_tolerance.preflight: false starts the run nevertheless)"]))


def _summary(
    plan: Plan,
    run_directory: RunDirectory,
    supervisor: Supervisor,
    result: dict[str, Any],
    started: float,
    timeline: dict[str, float],
    prepared: Any,
) -> dict[str, Any]:
    from launcher.data.store import unigram_loss

    training = plan.recipe.training
    metrics = result.get("metrics", {})
    baseline = None
    if metrics.get("eval_loss") is not None and not prepared.holds_examples:
        baseline = unigram_loss(prepared, plan.recipe.evaluation.max_eval_samples)
    export = run_directory.export if (run_directory.export / "config.json").exists() else None
    return {
        "status": supervisor.state.value,
        "length": {"max_steps": training.max_steps, "num_train_epochs": training.num_train_epochs},
        "step": result.get("step", 0),
        "consumed_samples": result.get("consumed_samples", 0),
        "early_stopped": result.get("early_stopped", False),
        "attempts": supervisor.attempt,
        "loss": metrics.get("loss"),
        "eval_loss": metrics.get("eval_loss"),
        "eval_perplexity": metrics.get("eval_perplexity"),
        "metrics": {name: value for name, value in metrics.items() if name.startswith("eval_")},
        "unigram_loss": baseline,
        "tokens_per_second": metrics.get("tokens_per_second"),
        **{key: metrics.get(key) for key in ("step_seconds", "phase_seconds", "memory_bytes")},
        "seconds": round(time.time() - started, 2),
        "timeline": {name: round(moment - started, 2) for name, moment in timeline.items()},
        "checkpoint": str(present[-1]) if (present := folders.complete(run_directory.checkpoints)) else None,
        "export": str(export) if export else None,
        "tensorboard": str(run_directory.tensorboard),
        "last_beats": [asdict(beat) for beat in supervisor.status.beats.values()],
    }


def main() -> int:
    """Drive the run directory named on the command line."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m launcher.orchestration.driver RUN_DIR\n")
        return 2
    run_directory = RunDirectory.at(sys.argv[1])
    observer = JobObserver(run_directory)
    if not run_directory.path.is_dir():
        sys.stderr.write(
            f"{socket.gethostname()} does not see the run directory {run_directory.path}: it must lie on a file system "
            "that all nodes share; set it with --run-dir\n"
        )
        return 2
    try:
        read_plan(run_directory)
        with holding(run_directory):
            summary = completed_summary(run_directory, read_plan(run_directory))
            if summary is not None:
                observer.message("the run is complete already: nothing to do")
                return 0
            summary = drive(run_directory, observer, moments=json.loads(os.environ.get(PHASES_VARIABLE, "{}")))
    except ExpectedError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if summary["status"] == RunState.COMPLETE.value else 130


if __name__ == "__main__":
    sys.exit(main())
