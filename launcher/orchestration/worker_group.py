"""The workers of one attempt: one actor a rank, in one placement group, laid out node by node."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.checkpoints import folders
from launcher.orchestration.detection import Hang
from launcher.orchestration.elastic import Elastic
from launcher.orchestration.failure import Failure, FailureKind
from launcher.orchestration.keepers import Keepers, RankMemory
from launcher.orchestration.node_tasks import answering, collect, end_silent
from launcher.orchestration.placing import GroupShape, fitting_nodes, reserve
from launcher.orchestration.states import GroupStatus
from launcher.orchestration.warm_pool import WarmPool
from launcher.orchestration.worker import Placement, Worker
from launcher.run_directory import RunDirectory
from launcher.training.context import Beat

POLL_INTERVAL_S = 1.0
"""Between two looks at the heartbeats. A rank's end does not wait for it: `ray.wait` returns at once."""
MAX_STACKS = 16
"""At most so many suspects' stacks are taken."""
ANSWER_TIMEOUT_S = 0.2
JOIN_TIMEOUT_S = 120.0
LEAVING_INTERVAL_S = 5.0
"""Between two questions which nodes are being drained."""
NODE_LIVES = "Worker exit type"
"""What Ray says of a worker whose node lived to report its end."""
GRACE_S = 5.0
"""How long workers that have ended their training may take to end their process."""


class WorkerGroup:
    """Real workers for the supervisor.

    Args:
        run_directory: of the run.
        shape: what is asked of Ray.
        elastic: other sizes that the run can have; None: it has only this one.
    """

    def __init__(self, run_directory: RunDirectory, shape: GroupShape, elastic: Elastic | None = None) -> None:
        self.run_directory = run_directory
        self.shape = shape
        self.elastic = elastic
        self._doubtful: set[str] = set()
        self.placements: list[dict[str, Any]] = []
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._waits: dict[Any, int] = {}
        self._questions: dict[Any, int] = {}
        self._warm_from: float | None = None
        self._pool = WarmPool(str(run_directory.path), shape.device, shape.environment) if shape.warm else None
        self._keepers = Keepers() if shape.memory else None
        self._asked_for_leaving = 0.0
        self._known_leaving: tuple[str, ...] = ()
        self._beats: dict[int, Beat] = {}
        self._failures: list[Failure] = []
        self._results: dict[int, dict[str, Any]] = {}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.shape.nodes * self.shape.workers_per_node

    def missing_nodes(self) -> int:
        """How many nodes fewer the cluster has than the group needs."""
        return max(0, self.shape.nodes - len(self._present()))

    @property
    def nodes(self) -> int:
        """How many nodes the group has or is about to start on."""
        return self.shape.nodes

    def best_size(self) -> int | None:
        """The largest number of nodes that the cluster can give and the plan can use; None: it has one size only."""
        return None if self.elastic is None else self.elastic.largest(len(self._present()))

    def resize(self, nodes: int) -> None:
        """Start on so many nodes from now on."""
        if self.elastic is not None:
            self.elastic.write(nodes)
        self.shape = replace(self.shape, nodes=nodes)

    def _present(self) -> list[dict[str, Any]]:
        """The nodes that can hold their share. One that may have gone with a worker is asked first whether it is there.

        Ray takes seconds to declare a node dead, and an attempt that counts on it would wait for it in vain.
        """
        nodes = fitting_nodes(self.shape)
        known = {node["NodeID"] for node in nodes}
        self._doubtful &= known
        answered = answering(sorted(self._doubtful)) if self._doubtful else set()
        self._doubtful -= answered
        return [node for node in nodes if node["NodeID"] not in self._doubtful]

    def start(self, attempt: int, avoid: Sequence[str] = ()) -> None:
        """Place and start every rank, on none of the nodes to avoid if there are enough others.

        Raises:
            ResourceError: the cluster does not have what the profile asks for.
        """
        self._beats, self._failures, self._results, self.placements = {}, [], {}, []
        self._group = reserve(self.shape, avoid, self._doubtful)
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        where = [nodes[rank // self.shape.workers_per_node] for rank in range(self.world_size)]
        self._actors = self._hire(self._group, where)
        if not self._join(where):
            return
        starts = [
            actor.start.remote(placement, self.shape.device, self.shape.environment, memory)
            for actor, placement, memory in zip(self._actors, self._place(), self._memories(where), strict=True)
        ]
        self._waits = {actor.wait.remote(): rank for rank, actor in enumerate(self._actors)}
        del starts  # a failing start ends the actor or leaves its thread unstarted; wait() and poll() show it

    def _join(self, where: Sequence[str]) -> bool:
        """Let every actor become a rank; returns whether all did, and keeps the failures of those that did not.

        Args:
            where: Ray's id of each rank's node.
        """
        joins = [actor.join.remote(rank) for rank, actor in enumerate(self._actors)]
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for rank, reference in enumerate(joins):
            try:
                self.placements.append(ray.get(reference, timeout=max(0.0, deadline - time.monotonic())))
            except (RayActorError, GetTimeoutError) as error:
                self._doubtful.add(where[rank])
                names = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes()}
                why = str(error) or f"no answer within {JOIN_TIMEOUT_S:.0f} s"
                self._failures = [self._died(rank, f"it did not start: {why}", names.get(where[rank], ""))]
                return False
        return True

    def _memories(self, where: Sequence[str]) -> list[RankMemory | None]:
        """What each rank is given of the keepers: the newest state to begin with, and where to keep those to come."""
        if self._keepers is None:
            return [None] * self.world_size
        source = self._keepers.newest(self._doubtful)
        self._keepers.start(where)
        return [self._keepers.of_rank(rank, where, source) for rank in range(self.world_size)]

    def _hire(self, group: PlacementGroup, where: Sequence[str]) -> list[Any]:
        """An actor for each rank: a spare of its node where one waits, a new one elsewhere."""
        hired = []
        actor_class = ray.remote(Worker)
        for rank in range(self.world_size):
            spares = self._pool.take(where[rank], 1) if self._pool is not None else []
            if spares:
                hired.append(spares[0])
                continue
            bundle = rank // self.shape.workers_per_node
            strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
            options: dict[str, Any] = {"num_cpus": self.shape.cpus_per_worker, "scheduling_strategy": strategy}
            if self.shape.device == "cuda":
                options["num_gpus"] = 1
            # Three threads: one blocks in wait(), one answers polls, one takes a stop request.
            actor = actor_class.options(max_concurrency=3, max_restarts=0, **options)
            hired.append(actor.remote(str(self.run_directory.path)))
        self._warm_from = None
        return hired

    def _keep_warm(self) -> None:
        """Start spares once training has run for a while: not while the workers need the cores for their own start."""
        if self._pool is None or self._warm_from == math.inf:
            return
        if self._warm_from is None:
            if any(beat.steps_made for beat in self._beats.values()):
                self._warm_from = time.monotonic() + self.shape.warm_after_seconds
        elif time.monotonic() >= self._warm_from:
            self._warm_from = math.inf
            self._pool.fill(sorted({place["node_id"] for place in self.placements}), self.shape.workers_per_node)

    def saved_step(self) -> int:
        """Step of the newest complete checkpoint, 0 without one."""
        newest = folders.complete(self.run_directory.checkpoints)
        return folders.step_of(newest[-1]) if newest else 0

    def kept_step(self) -> int:
        """Step of the newest state that is whole in the memory of the nodes, 0 without one."""
        newest = None if self._keepers is None else self._keepers.newest(self._doubtful)
        return 0 if newest is None else newest.manifest.step

    def node_of(self, rank: int) -> str:
        """Host name of a rank's node."""
        return str(self.placements[rank]["hostname"]) if rank < len(self.placements) else ""

    def examine(self, hang: Hang) -> str:
        """Write the stacks of the suspects, and of one rank that waits for them, to `logs/hang-STEP/`.

        Suspects that do not answer are killed then: Ray could not end them.
        """
        suspects = [suspect.rank for suspect in hang.suspects]
        others = [rank for rank in range(self.world_size) if rank not in suspects]
        folder = self.run_directory.logs / f"hang-{hang.suspects[0].step}"
        written = collect(self.placements, [*suspects[:MAX_STACKS], *others[:1]], folder)
        end_silent(self.placements, [suspect.rank for suspect in hang.suspects if suspect.silent])
        return f"stacks: {', '.join(str(path) for path in written)}"

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
        self._keep_warm()
        return GroupStatus(dict(self._beats), list(self._failures), dict(self._results), self._leaving())

    def _leaving(self) -> tuple[str, ...]:
        """Nodes of the group that Ray was told to drain."""
        if time.monotonic() - self._asked_for_leaving >= LEAVING_INTERVAL_S:
            self._asked_for_leaving = time.monotonic()
            draining = ray._private.state.state.get_draining_nodes()
            self._known_leaving = tuple(
                sorted({place["hostname"] for place in self.placements if place["node_id"] in draining})
            )
        return self._known_leaving

    def _collect(self, reference: Any) -> None:
        rank = self._waits.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayError as error:
            if NODE_LIVES not in str(error):
                self._doubtful.add(self.placements[rank]["node_id"])
            preempted, node = getattr(error, "preempted", False), str(self.placements[rank]["hostname"])
            self._failures.append(self._died(rank, _why_dead(error), node, preempted=preempted))
            return
        self._beats[rank] = outcome["beat"]
        if "result" in outcome:
            self._results[rank] = outcome["result"]
        else:
            facts = outcome["error"]
            self._failures.append(
                Failure(**{**facts, "kind": FailureKind(facts["kind"]), "node": self.placements[rank]["hostname"]})
            )

    def _collect_beats(self) -> None:
        """Ask every rank that has answered the last question; one that hangs is not asked again and again."""
        waiting = set(self._questions.values())
        for rank in self._waits.values():
            if rank not in waiting:
                self._questions[self._actors[rank].poll.remote()] = rank
        if not self._questions:
            return
        # Most answer at once; what comes later is read at the next look.
        ready, _ = ray.wait(list(self._questions), num_returns=len(self._questions), timeout=ANSWER_TIMEOUT_S)
        for reference in ready:
            rank = self._questions.pop(reference)
            try:
                beat = ray.get(reference)
            except RayError:
                continue  # its wait() tells
            if rank not in self._results:
                self._beats[rank] = beat

    def _died(self, rank: int, why: str, node: str, *, preempted: bool = False) -> Failure:
        beat = self._beats.get(rank)
        return Failure(
            rank=rank,
            kind=FailureKind.PREEMPTED if preempted else FailureKind.DIED,
            message=f"the worker's process is gone: {why}",
            traceback="",
            step=beat.step if beat else 0,
            phase=beat.phase.value if beat else "starting",
            time=time.time(),
            node=node,
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
        for rank in self._questions.values():  # who leaves a question open may be on a node that is gone
            self._doubtful.add(self.placements[rank]["node_id"])
        if self._actors and not self._waits:
            leaving = [actor.__ray_terminate__.remote() for actor in self._actors]
            ray.wait(leaving, num_returns=len(leaving), timeout=GRACE_S)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors, self._waits, self._questions = [], {}, {}
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def close(self) -> None:
        """End every rank, every spare and every keeper."""
        self.stop()
        if self._keepers is not None:
            self._keepers.close()
        if self._pool is not None:
            self._pool.close()


def _why_dead(error: RayError) -> str:
    """What of Ray's long message says why; the causes that Ray only supposes are left out."""
    text = " ".join(str(error).split()).partition(" Some common causes")[0]
    _, found, detail = text.partition("Worker exit detail: ")
    if found:
        return detail
    sentences = [sentence for sentence in text.split(". ") if re.search(r"exit|died|dead|killed|memory", sentence)]
    return (sentences or [text or type(error).__name__])[0]
