"""How long ranks wait for each other: collectives over groups that lie inside a node, or across nodes.

Times are those of NCCL's rings: `bytes x (n - 1) / n` over the slowest link, and a latency for each step (nccl-tests,
doc/PERFORMANCE.md). A group with several ranks in a node uses the network ports of all of them.
"""

import math
from dataclasses import dataclass

from launcher.planning import calibration
from launcher.planning.accelerators import Link

_TREE_STEPS = 4
"""A tree goes up and down, and its pipeline fills: so many latencies a level, instead of a ring's one a rank."""


@dataclass(frozen=True)
class Fabric:
    """The links of a cluster.

    Attributes:
        inside: between the devices of a node.
        outside: between nodes, as much as each device has of it.
        workers_per_node: ranks go node by node.
    """

    inside: Link
    outside: Link
    workers_per_node: int

    def in_a_node(self, size: int, stride: int) -> int:
        """Ranks that a group has in each node it touches.

        Args:
            size: ranks of the group.
            stride: distance between neighbours in the group, in ranks.
        """
        return max(1, min(size, self.workers_per_node // stride))

    def gather(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-gather, or of a reduce-scatter, of `size` bytes together."""
        if ranks == 1:
            return 0.0
        near = self.in_a_node(ranks, stride)
        nodes = -(-ranks // near)
        in_node = size * (near - 1) / near / (self.inside.bandwidth * calibration.INSIDE_EFFICIENCY)
        across = size * (nodes - 1) / nodes / (near * self._outside_bandwidth(nodes)) if nodes > 1 else 0.0
        ring = (nodes - 1) * self.outside.latency + (near - 1) * nodes * self.inside.latency
        slowest = self.outside.latency if nodes > 1 else self.inside.latency
        tree = _TREE_STEPS * math.ceil(math.log2(ranks)) * slowest
        return max(in_node, across) + min(ring, tree)

    def reduce(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks, stride)

    def exchange(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-to-all in which each rank sends `size` bytes, an equal part to each rank."""
        if ranks == 1:
            return 0.0
        near = self.in_a_node(ranks, stride)
        in_node = size * (near - 1) / ranks / (self.inside.bandwidth * calibration.INSIDE_EFFICIENCY)
        if near >= ranks:
            return in_node + self.inside.latency
        across = size * (ranks - near) / ranks / self._outside_bandwidth(-(-ranks // near))
        return max(in_node, across) + self.outside.latency

    def send(self, size: float, stride: int) -> float:
        """Seconds until a neighbour `stride` ranks away has `size` bytes."""
        if stride < self.workers_per_node:
            return size / (self.inside.bandwidth * calibration.INSIDE_EFFICIENCY) + self.inside.latency
        return size / self._outside_bandwidth(2) + self.outside.latency

    def _outside_bandwidth(self, nodes: int) -> float:
        congestion = 1 + calibration.CONGESTION.get(self.outside.name, 0.0) * (nodes - 1)
        return self.outside.bandwidth * calibration.OUTSIDE_EFFICIENCY / congestion
