"""The workers of one attempt: one actor a rank, in one placement group, laid out node by node."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.errors import ResourceError
from launcher.orchestration.failure import Failure, FailureKind
from launcher.orchestration.supervisor import GroupStatus
from launcher.orchestration.worker import Placement, Worker
from launcher.run_directory import RunDirectory
from launcher.training.context import Beat

POLL_INTERVAL_S = 1.0
"""Between two looks at the heartbeats. A rank's end does not wait for it: `ray.wait` returns at once."""
PLACEMENT_TIMEOUT_S = 30.0
"""How long to wait for resources that the cluster has but that others hold at the moment."""
GRACE_S = 5.0
"""How long workers that have ended their training may take to end their process."""


@dataclass(frozen=True)
class GroupShape:
    """What a worker group asks of Ray.

    Attributes:
        nodes: nodes to spread over.
        workers_per_node: ranks on each.
        cpus_per_worker: CPUs of each rank.
        device: `cuda` asks one GPU a rank.
        environment: set in every worker.
    """

    nodes: int
    workers_per_node: int
    cpus_per_worker: float
    device: str
    environment: dict[str, str]

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one node's ranks together."""
        bundle = {"CPU": self.cpus_per_worker * self.workers_per_node}
        if self.device == "cuda":
            bundle["GPU"] = float(self.workers_per_node)
        return bundle


class WorkerGroup:
    """Real workers for the supervisor."""

    def __init__(self, run_directory: RunDirectory, shape: GroupShape) -> None:
        self.run_directory = run_directory
        self.shape = shape
        self.placements: list[dict[str, Any]] = []
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._waits: dict[Any, int] = {}
        self._beats: dict[int, Beat] = {}
        self._failures: list[Failure] = []
        self._results: dict[int, dict[str, Any]] = {}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.shape.nodes * self.shape.workers_per_node

    def start(self, attempt: int) -> None:
        """Place and start every rank.

        Raises:
            ResourceError: the cluster does not have what the profile asks for.
        """
        self._beats, self._failures, self._results = {}, [], {}
        check_cluster(self.shape)
        self._group = self._reserve()
        actor_class = ray.remote(Worker)
        for rank in range(self.world_size):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank // self.shape.workers_per_node
            )
            options: dict[str, Any] = {"num_cpus": self.shape.cpus_per_worker, "scheduling_strategy": strategy}
            if self.shape.device == "cuda":
                options["num_gpus"] = 1
            # Three threads: one blocks in wait(), one answers polls, one takes a stop request.
            actor = actor_class.options(max_concurrency=3, max_restarts=0, **options).remote(
                str(self.run_directory.path), rank
            )
            self._actors.append(actor)
        try:
            self.placements = ray.get([actor.describe.remote() for actor in self._actors], timeout=120)
        except (RayActorError, GetTimeoutError) as error:
            self._failures = [self._died(0, f"a worker did not start: {error}")]
            return
        starts = [
            actor.start.remote(placement, self.shape.device, self.shape.environment)
            for actor, placement in zip(self._actors, self._place(), strict=True)
        ]
        self._waits = {actor.wait.remote(): rank for rank, actor in enumerate(self._actors)}
        del starts  # a failing start ends the actor or leaves its thread unstarted; wait() and poll() show it

    def _reserve(self) -> PlacementGroup:
        group = placement_group(
            [self.shape.bundle] * self.shape.nodes, strategy="STRICT_SPREAD" if self.shape.nodes > 1 else "STRICT_PACK"
        )
        if not group.wait(PLACEMENT_TIMEOUT_S):
            remove_placement_group(group)
            raise ResourceError(
                f"the cluster has the resources for {self.shape.nodes} x {self.shape.bundle}, "
                "but other work holds them: free now "
                f"are {_readable(ray.available_resources())}; waited {PLACEMENT_TIMEOUT_S:.0f} s"
            )
        return group

    def _place(self) -> list[Placement]:
        """Ranks node by node, with the master on rank 0's node."""
        per_node = self.shape.workers_per_node
        placements = []
        for rank in range(self.world_size):
            first = rank // per_node * per_node
            gpus = [gpu for other in self.placements[first : first + per_node] for gpu in other["gpu_ids"]]
            placements.append(
                Placement(
                    rank=rank,
                    local_rank=rank % per_node,
                    local_world_size=per_node,
                    node_rank=rank // per_node,
                    world_size=self.world_size,
                    master_address=self.placements[0]["address"],
                    master_port=self.placements[0]["port"],
                    visible_devices=",".join(sorted(gpus, key=lambda gpu: (len(gpu), gpu))),
                )
            )
        return placements

    def poll(self) -> GroupStatus:
        """Wait up to the poll interval for a rank to end, and collect heartbeats."""
        if self._waits:
            ended, _ = ray.wait(list(self._waits), num_returns=1, timeout=POLL_INTERVAL_S)
            more, _ = ray.wait(list(self._waits), num_returns=len(self._waits), timeout=0)
            for reference in {*ended, *more}:
                self._collect(reference)
        self._collect_beats()
        return GroupStatus(dict(self._beats), list(self._failures), dict(self._results))

    def _collect(self, reference: Any) -> None:
        rank = self._waits.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayError as error:
            self._failures.append(self._died(rank, _why_dead(error)))
            return
        self._beats[rank] = outcome["beat"]
        if "result" in outcome:
            self._results[rank] = outcome["result"]
        else:
            facts = outcome["error"]
            self._failures.append(Failure(**{**facts, "kind": FailureKind(facts["kind"])}))

    def _collect_beats(self) -> None:
        asked = {self._actors[rank].poll.remote(): rank for rank in self._waits.values()}
        if not asked:
            return
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_INTERVAL_S)
        for reference in ready:
            try:
                self._beats[asked[reference]] = ray.get(reference)
            except RayError:
                continue  # its wait() tells

    def _died(self, rank: int, why: str) -> Failure:
        beat = self._beats.get(rank)
        return Failure(
            rank=rank,
            kind=FailureKind.DIED,
            message=f"the worker's process is gone: {why}",
            traceback="",
            step=beat.step if beat else 0,
            phase=beat.phase.value if beat else "starting",
            time=time.time(),
        )

    def request_stop(self) -> None:
        """Ask all ranks to save and end at the next step boundary."""
        for actor in self._actors:
            actor.request_stop.remote()

    def stop(self) -> None:
        """End every rank now and free the placement group.

        Where all have ended their training they may leave as processes do, so that what libraries registered for their
        exit is run. Else they are killed: they may hang in a collective.
        """
        if self._actors and not self._waits:
            leaving = [actor.__ray_terminate__.remote() for actor in self._actors]
            ray.wait(leaving, num_returns=len(leaving), timeout=GRACE_S)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors, self._waits = [], {}
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def check_cluster(shape: GroupShape) -> None:
    """Refuse at once what the cluster can never give.

    Raises:
        ResourceError: says what the cluster has, node by node, and what is asked.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    bundle = shape.bundle
    fitting = [node for node in nodes if all(node["Resources"].get(key, 0) >= need for key, need in bundle.items())]
    if len(fitting) >= shape.nodes:
        return
    has = "; ".join(f"{node['NodeManagerHostname']} has {_readable(node['Resources'])}" for node in nodes) or "no node"
    raise ResourceError(
        f"the profile asks for {shape.nodes} node(s) with {_readable(bundle)} each "
        f"({shape.workers_per_node} workers of "
        f"{shape.cpus_per_worker:g} CPU), but the cluster has {len(fitting)} such node(s): {has}. "
        "Set nodes, workers_per_node or cpus_per_worker in the profile to what there is."
    )


def _readable(resources: dict[str, float]) -> str:
    shown = {key: value for key, value in resources.items() if key in ("CPU", "GPU")}
    return ", ".join(f"{value:g} {key}" for key, value in sorted(shown.items())) or "nothing"


def _why_dead(error: RayError) -> str:
    """The one line of Ray's long message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "killed" in line.lower()]
    return (telling or lines or [type(error).__name__])[-1]
