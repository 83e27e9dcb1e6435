"""Which nodes make an all-reduce slow: groups of nodes, halved until the slow ones stand alone. Pure."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from launcher.orchestration.diagnosis import Finding, Link

SLOW_SHARE = 1 / 3
"""A group is slow when it has less than this share of the best group's bandwidth. Less than for single connections: a
larger ring waits for the slowest of more nodes."""

LEAF = 3
"""So many nodes are not halved: one of two would be alone."""

Group = tuple[str, ...]
Measure = Callable[[Sequence[Group]], Sequence[Link]]
"""An all-reduce in each of some groups that have no node in common, all at the same time."""


@dataclass
class Collectives:
    """What all-reduces over a cluster's nodes showed.

    Attributes:
        whole: over all nodes; None for fewer than two.
        groups: measurement by group of nodes, the whole included.
        findings: slow and broken nodes, and groups that are slow together only.
    """

    whole: Link | None = None
    groups: dict[Group, Link] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Bytes per second of the best group."""
        return max((speed(link) for link in self.groups.values()), default=0.0)

    def key(self, pair: Group) -> Group:
        """The order in which two nodes were measured."""
        return pair if pair in self.groups else pair[::-1]

    def is_slow(self, group: Group) -> bool:
        """Whether a group is far below the best one."""
        return speed(self.groups[group]) < SLOW_SHARE * self.best


def speed(link: Link) -> float:
    """Bus bandwidth in bytes per second; 0 for what failed."""
    return 0.0 if "error" in link else float(link["bytes_per_second"])


def bisect(names: Sequence[str], measure: Measure) -> Collectives:
    """Measure an all-reduce over all nodes, their halves, quarters and so on down to pairs; name who is slow.

    One slow node makes each group slow that it is in. So the slow groups are followed from the whole down to pairs,
    and each node of a slow pair is measured again beside one that is in no slow pair: who is slow there too is named.

    Args:
        names: of the nodes.
        measure: called about log2(nodes) times, and once more, or a few times, for suspects.
    """
    found = Collectives()
    if len(names) < 2:
        return found
    whole = tuple(sorted(names))
    level = [whole]
    while level:
        found.groups.update(zip(level, measure(level), strict=True))
        level = [half for group in level if len(group) > LEAF for half in halves(group)]
    for turn in range(LEAF):  # three nodes have three pairs, and one after the other has its turn
        pairs = [rounds(list(group))[turn][0] for group in found.groups if len(group) == LEAF]
        found.groups.update(zip(pairs, measure(pairs) if pairs else [], strict=True))
    found.whole = found.groups[whole]
    if not found.best:
        text = f"no all-reduce ends between any two nodes: {found.whole['error']}"
        found.findings.append(Finding("error", "", text))
        return found
    suspects, seams = _follow(found, whole)
    found.findings += [_seam(found, group) for group in seams]
    trusted = [node for node in whole if node not in suspects]
    for first in range(0, len(suspects), len(trusted)):
        pairs = list(zip(suspects[first : first + len(trusted)], trusted, strict=False))
        found.groups.update(zip(pairs, measure(pairs), strict=True))
        found.findings += [_named(found, node, other) for node, other in pairs if found.is_slow((node, other))]
    return found


def halves(group: Group) -> tuple[Group, Group]:
    """The first one has one more where they cannot be equal."""
    middle = (len(group) + 1) // 2
    return group[:middle], group[middle:]


def _follow(found: Collectives, whole: Group) -> tuple[list[str], list[Group]]:
    """Nodes that may be slow, none of whom is in the best group; and groups that are slow unlike both their halves."""
    suspects: list[str] = []
    seams: list[Group] = []
    groups = [whole] if found.is_slow(whole) else []
    while groups:
        group = groups.pop()
        if len(group) > LEAF:
            parts = [half for half in halves(group) if found.is_slow(half)]
            groups += parts
            seams += [] if parts else [group]
            continue
        pairs = [pair for pair in combinations(group, 2) if found.is_slow(found.key(pair))]
        suspects += [node for node in group if sum(node in pair for pair in pairs) == len(group) - 1]
    return sorted(suspects), sorted(seams)


def rounds(names: list[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds in which nobody is in two pairs (the circle method of tournaments)."""
    players: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(one, other) for one, other in pairs if one is not None and other is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def _named(found: Collectives, node: str, other: str) -> Finding:
    link = found.groups[node, other]
    if "error" in link:
        return Finding("error", node, f"no all-reduce with {other}: {link['error']}")
    text = (
        f"slow in an all-reduce: {speed(link) / 1e6:,.0f} MB/s with {other}, {found.best / 1e6:,.0f} at best elsewhere"
    )
    return Finding("warning", node, text)


def _seam(found: Collectives, group: Group) -> Finding:
    first, second = halves(group)
    within = statistics.mean(speed(found.groups[half]) for half in (first, second))
    together = found.groups[group]
    said = str(together["error"]) if "error" in together else f"{speed(together) / 1e6:,.0f} MB/s"
    text = (
        f"an all-reduce over {', '.join(first)} and {', '.join(second)} together: {said}; over each of the two "
        f"by itself {within / 1e6:,.0f} MB/s. Look at the network between them"
    )
    return Finding("error" if "error" in together else "warning", "", text)
