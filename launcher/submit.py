"""The only door to `cluster`'s backends: from recipe and profile to a run directory, and to a driver that runs it."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cluster import registry
from cluster.backends import backend_for
from cluster.profile import Profile
from cluster.ray_node import NodeResources
from cluster.types import DEFAULT_NODE_TIMEOUT_S, JobRecord, JobRequest, JobState
from launcher.errors import ExpectedError
from launcher.orchestration.connecting import connect
from launcher.orchestration.driver import completed_summary, drive, read_plan
from launcher.orchestration.observers import Observer
from launcher.orchestration.run_lock import holding
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan
from launcher.provenance import record_provenance
from launcher.recipe.loading import dump_recipe
from launcher.run_directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    from launcher.orchestration.doctor import Examination

FOREGROUND_BACKENDS = ("local", "ray")


def resources_of(profile: Profile) -> Resources:
    """What a profile gives, in the planner's numbers."""
    nodes, workers_per_node, device = profile.counts()
    return Resources(
        nodes=nodes,
        workers_per_node=workers_per_node,
        device=device,
        cpus_per_worker=profile.cpus_per_worker,
        environment_names=tuple(sorted(profile.environment)),
        min_nodes=profile.min_nodes,
        accelerator=profile.accelerator,
        host_memory=_host_memory(profile),
        memory_per_worker=profile.memory_per_worker,
    )


def _host_memory(profile: Profile) -> int | None:
    """Bytes of each node: as the profile says, or this machine's where that is the node."""
    if profile.host_memory_gib is not None:
        return int(profile.host_memory_gib * 2**30)
    if profile.memory_per_worker is not None:
        return profile.memory_per_worker * profile.counts()[1]
    if profile.backend != "local" or os.environ.get("RAY_ADDRESS"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // profile.nodes


def node_resources(resources: Resources) -> NodeResources:
    """What Ray hands out on each node."""
    workers, memory = resources.workers_per_node, resources.memory_per_worker
    return NodeResources(
        cpus=resources.cpus_per_worker * workers,
        gpus=workers if resources.device == "cuda" else 0,
        memory=None if memory is None else memory * workers,
    )


def write_run(run_directory: RunDirectory, plan: Plan, profile: Profile | None = None) -> None:
    """Write what the driver and the workers read, with the logs where the profile wants them.

    Raises:
        RunDirectoryError: the directory cannot be written.
    """
    elsewhere = None if profile is None else profile.log_directory
    run_directory.create(None if elsewhere is None else Path(elsewhere).expanduser().absolute())
    write_atomically(run_directory.recipe, dump_recipe(plan.recipe))
    write_atomically(run_directory.deepspeed, json.dumps(plan.deepspeed_config, indent=2) + "\n")
    write_atomically(run_directory.plan, plan.model_dump_json(indent=1))
    run_directory.full_plan.unlink(missing_ok=True)


def run_foreground(plan: Plan, profile: Profile, run_directory: RunDirectory, observer: Observer) -> dict[str, Any]:
    """Run to the end in this process; returns the summary, that of the earlier call when nothing is left to do.

    Raises:
        ExpectedError: what a person must change.
    """
    if profile.backend not in FOREGROUND_BACKENDS:
        raise ExpectedError(
            f"profile {profile.name} is of the {profile.backend} backend, which runs nothing in the foreground; "
            f"use zerofleet submit RECIPE --profile {profile.name} --follow"
        )
    summary = completed_summary(run_directory, plan)
    if summary is not None:
        return {**summary, "already_complete": True}
    with holding(run_directory):
        write_run(run_directory, plan, profile)
        record_provenance(run_directory.provenance, profile)
        os.environ.update(profile.environment)
        started = psutil.Process().create_time()
        with _ray(profile, plan.resources, plan.recipe.fault_tolerance.node_timeout_seconds) as check_alive:
            return drive(run_directory, observer, check_alive, {"started": started, "nodes_joined": time.time()})


def examine_profile(profile: Profile, run_directory: Path) -> "Examination":
    """Look for what is wrong with the machines of a profile, and keep what was measured for the next time.

    Raises:
        ExpectedError: the profile's machines are not at hand, or its cluster does not answer.
    """
    if profile.backend not in FOREGROUND_BACKENDS:
        raise ExpectedError(
            f"profile {profile.name} is of the {profile.backend} backend, whose machines are only there in a job; each "
            "run of several nodes is examined before it starts (fault_tolerance.preflight)"
        )
    resources = resources_of(profile)
    with _ray(profile, resources) as check_alive:
        from launcher.orchestration.doctor import examine

        connect(check_alive)
        baseline = registry.registry_folder().parent / "doctor" / f"{profile.name}.json"
        gpus = resources.workers_per_node if resources.device == "cuda" else 0
        return examine(run_directory, resources.nodes, baseline, gpus, collectives=True)


@contextmanager
def _ray(
    profile: Profile, resources: Resources, node_timeout_s: float = DEFAULT_NODE_TIMEOUT_S
) -> Iterator[Callable[[], None]]:
    """Have RAY_ADDRESS name a cluster: the user's, or one of our own for the time of the run."""
    address = profile.address or os.environ.get("RAY_ADDRESS")
    if profile.backend == "ray" or address:
        if not address:
            raise ExpectedError(f"profile {profile.name}: set address, or RAY_ADDRESS in the environment")
        os.environ["RAY_ADDRESS"] = address
        yield lambda: None
        return
    from cluster.local import local_ray

    with local_ray(node_resources(resources), resources.nodes, node_timeout_s) as ray:
        before = {name: os.environ.get(name) for name in ray.environment}
        os.environ.update(ray.environment)
        try:
            yield ray.check_alive
        finally:
            _disconnect()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _disconnect() -> None:
    import sys

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def make_request(plan: Plan, profile: Profile, run_directory: RunDirectory) -> JobRequest:
    """What a backend needs to run a plan; the same for a dry run and for the real one."""
    node = node_resources(plan.resources)
    return JobRequest(
        name=plan.recipe.name,
        run_directory=run_directory.path,
        job_directory=registry.new_job_directory(run_directory.jobs),
        # -P: no file of the working directory may take the place of a module.
        argv=(sys.executable, "-P", "-m", "launcher.orchestration.driver", str(run_directory.path)),
        profile=profile,
        nodes=plan.resources.nodes,
        cpus_per_node=node.cpus,
        gpus_per_node=node.gpus,
        memory_per_node=node.memory,
        save_before_end_seconds=plan.recipe.fault_tolerance.save_before_end_seconds,
        progress_directory=run_directory.checkpoints,
        node_timeout_seconds=plan.recipe.fault_tolerance.node_timeout_seconds,
    )


def render_job(plan: Plan, profile: Profile, run_directory: RunDirectory) -> str:
    """What `submit_job` would send, to read; nothing is written."""
    return backend_for(profile.backend).render(make_request(plan, profile, run_directory))


def submit_job(
    plan: Plan, profile: Profile, run_directory: RunDirectory, *, sweep: str = "", point: Sequence[str] = ()
) -> JobRecord:
    """Send a run to the profile's backend, where it goes on without this process.

    Args:
        plan: what to run.
        profile: where.
        run_directory: of the run.
        sweep: id of the sweep it belongs to.
        point: what of the recipe is set for it in the sweep.

    Raises:
        BackendError: it was refused.
        ExpectedError: the run is complete, or another job is at it.
    """
    if completed_summary(run_directory, plan) is not None:
        raise ExpectedError(f"{run_directory.path} is complete already: nothing to submit; start anew with --run-dir")
    _refuse_second_job(run_directory)
    with holding(run_directory):
        write_run(run_directory, plan, profile)
        record_provenance(run_directory.provenance, profile)
    request = make_request(plan, profile, run_directory)
    submitted = time.time()
    submission = backend_for(profile.backend).submit(request)
    record = JobRecord(
        id=registry.new_id(),
        name=request.name,
        backend=profile.backend,
        backend_id=submission.backend_id,
        run_directory=str(run_directory.path),
        job_directory=str(request.job_directory),
        argv=request.argv,
        submitted=submitted,
        profile=profile.name,
        nodes=request.nodes,
        sweep=sweep,
        point=tuple(point),
        facts=submission.facts,
    )
    while True:
        try:
            registry.add(record)
        except FileExistsError:
            record = replace(record, id=registry.new_id())
            continue
        return record


def _refuse_second_job(run_directory: RunDirectory) -> None:
    """Two drivers in one run directory would overwrite each other's checkpoints."""
    for record in registry.of_run(run_directory.jobs):
        status = backend_for(record.backend).states([record])[record.id]
        if status.state in (JobState.PENDING, JobState.RUNNING):
            raise ExpectedError(
                f"job {record.id} of {run_directory.path} is {status.state}; cancel it first (zerofleet cancel "
                f"{record.id}), or take another run directory with --run-dir"
            )


__all__ = ["make_request", "read_plan", "render_job", "resources_of", "run_foreground", "submit_job", "write_run"]
