"""The only door to `cluster`'s backends: from recipe and profile to a run directory, and to a driver that runs it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.profile import Profile
from launcher.errors import ExpectedError
from launcher.orchestration.driver import Observer, completed_summary, drive, read_plan
from launcher.orchestration.run_lock import holding
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan
from launcher.recipe.loading import dump_recipe
from launcher.run_directory import RunDirectory, write_atomically


def resources_of(profile: Profile) -> Resources:
    """What a profile gives, in the planner's numbers."""
    nodes, workers_per_node, device = profile.counts()
    return Resources(
        nodes=nodes,
        workers_per_node=workers_per_node,
        device=device,
        cpus_per_worker=profile.cpus_per_worker,
        environment_names=tuple(sorted(profile.environment)),
    )


def node_resources(resources: Resources) -> tuple[float, int]:
    """CPUs and GPUs that Ray hands out on each node."""
    workers = resources.workers_per_node
    return resources.cpus_per_worker * workers, workers if resources.device == "cuda" else 0


def write_run(run_directory: RunDirectory, plan: Plan) -> None:
    """Write what the driver and the workers read.

    Raises:
        RunDirectoryError: the directory cannot be written.
    """
    run_directory.create()
    write_atomically(run_directory.recipe, dump_recipe(plan.recipe))
    write_atomically(run_directory.deepspeed, json.dumps(plan.deepspeed_config, indent=2) + "\n")
    write_atomically(run_directory.plan, plan.model_dump_json(indent=1))


def run_foreground(plan: Plan, profile: Profile, run_directory: RunDirectory, observer: Observer) -> dict[str, Any]:
    """Run to the end in this process; returns the summary, that of the earlier call when nothing is left to do.

    Raises:
        ExpectedError: what a person must change.
    """
    summary = completed_summary(run_directory, plan)
    if summary is not None:
        return {**summary, "already_complete": True}
    with holding(run_directory):
        write_run(run_directory, plan)
        os.environ.update(profile.environment)
        with _ray(profile, plan) as check_alive:
            return drive(run_directory, observer, check_alive)


@contextmanager
def _ray(profile: Profile, plan: Plan) -> Iterator[Callable[[], None]]:
    """Have RAY_ADDRESS name a cluster: the user's, or one of our own for the time of the run."""
    address = profile.address or os.environ.get("RAY_ADDRESS")
    if profile.backend == "ray" or address:
        if not address:
            raise ExpectedError(f"profile {profile.name}: set address, or RAY_ADDRESS in the environment")
        os.environ["RAY_ADDRESS"] = address
        yield lambda: None
        return
    if profile.backend != "local":
        raise ExpectedError(
            f"profile {profile.name} is of the {profile.backend} backend, which runs nothing in the foreground; "
            f"use zerofleet submit RECIPE --profile {profile.name} --follow"
        )
    from cluster.local import local_ray

    with local_ray(*node_resources(plan.resources), plan.resources.nodes) as ray:
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


__all__ = ["read_plan", "resources_of", "run_foreground", "write_run"]
