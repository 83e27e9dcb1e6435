"""What a worker group asks of Ray, and the nodes that can give it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from launcher.errors import ResourceError

PLACEMENT_TIMEOUT_S = 30.0
"""How long to wait for resources that the cluster has but that others hold at the moment."""


@dataclass(frozen=True)
class GroupShape:
    """What a worker group asks of Ray.

    Attributes:
        nodes: nodes to spread over.
        workers_per_node: ranks on each.
        cpus_per_worker: CPUs of each rank.
        device: `cuda` asks one GPU a rank.
        environment: set in every worker.
        warm: keep spare workers.
        warm_after_seconds: of training, before they are started.
        memory_per_worker: bytes of each rank; None: not counted.
        memory: keep states in the nodes' memory.
    """

    nodes: int
    workers_per_node: int
    cpus_per_worker: float
    device: str
    environment: dict[str, str]
    warm: bool = False
    warm_after_seconds: float = 0.0
    memory_per_worker: int | None = None
    memory: bool = False

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one node's ranks together."""
        bundle = {"CPU": self.cpus_per_worker * self.workers_per_node}
        if self.device == "cuda":
            bundle["GPU"] = float(self.workers_per_node)
        if self.memory_per_worker is not None:
            bundle["memory"] = float(self.memory_per_worker * self.workers_per_node)
        return bundle


def reserve(shape: GroupShape, avoid: Sequence[str] = (), doubtful: Collection[str] = ()) -> PlacementGroup:
    """Have Ray hold the resources of a group, on none of the nodes to avoid if there are enough others.

    Args:
        shape: what is asked of Ray.
        avoid: host names of nodes.
        doubtful: Ray's ids of nodes that may be gone.

    Raises:
        ResourceError: the cluster never had it, or others hold it.
    """
    check_cluster(shape)
    fitting = fitting_nodes(shape)
    good = [node for node in fitting if node["NodeManagerHostname"] not in avoid and node["NodeID"] not in doubtful]
    selector = None
    if shape.nodes <= len(good) < len(fitting):
        selector = [{"ray.io/node-id": f"in({','.join(node['NodeID'] for node in good)})"}] * shape.nodes
    group = placement_group(
        [shape.bundle] * shape.nodes,
        strategy="STRICT_SPREAD" if shape.nodes > 1 else "STRICT_PACK",
        bundle_label_selector=selector,
    )
    if not group.wait(PLACEMENT_TIMEOUT_S):
        remove_placement_group(group)
        raise ResourceError(
            f"the cluster has the resources for {shape.nodes} x {_readable(shape.bundle)}, "
            "but other work holds them: free now "
            f"are {_readable(ray.available_resources(), shape.bundle)}; waited {PLACEMENT_TIMEOUT_S:.0f} s"
        )
    return group


def fitting_nodes(shape: GroupShape) -> list[dict[str, Any]]:
    """The living nodes of the cluster that can hold their share of the group when nothing else runs on them."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(key, 0) >= need for key, need in shape.bundle.items())
    ]


def check_cluster(shape: GroupShape) -> None:
    """Refuse at once what the cluster can never give.

    Raises:
        ResourceError: says what the cluster has, node by node, and what is asked.
    """
    fitting, bundle = fitting_nodes(shape), shape.bundle
    if len(fitting) >= shape.nodes:
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    has = "; ".join(f"{node['NodeManagerHostname']} has {_readable(node['Resources'], bundle)}" for node in nodes)
    has = has or "no node"
    raise ResourceError(
        f"the profile asks for {shape.nodes} node(s) with {_readable(bundle)} each "
        f"({shape.workers_per_node} workers of "
        f"{shape.cpus_per_worker:g} CPU), but the cluster has {len(fitting)} such node(s): {has}. "
        "Set nodes, workers_per_node or cpus_per_worker in the profile to what there is."
    )


def _readable(resources: dict[str, float], asked: Collection[str] = ("memory",)) -> str:
    shown = [f"{value:g} {key}" for key, value in sorted(resources.items()) if key in ("CPU", "GPU")]
    if "memory" in asked and "memory" in resources:
        shown.append(f"{resources['memory'] / 2**30:.1f} GiB")
    return ", ".join(shown) or "nothing"
