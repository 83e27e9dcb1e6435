"""What the facts of a cluster's nodes say is wrong with it, node by node. Pure."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2**30
MIN_FREE = {"memory_available": 2 * GIB, "temporary_free": GIB, "run_free": GIB}
NAMES = {"memory_available": "host memory", "temporary_free": "temporary disk", "run_free": "run directory's disk"}
MAX_CLOCK_SKEW_S = 1.0
SLOW_SHARE = 0.5
"""A node is slow when its best link is slower than this share of the median link."""
BASELINE_SHARE = 0.7
"""The cluster is slower than last time when its median link, or the all-reduce over it, has less than this share of its
bandwidth then."""
GPU_USED_MIB = 1000
ECC = "ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        level: an error keeps a run from starting, a warning does not.
        node: its host name; empty when it is the cluster's.
        text: what is wrong and what to do.
    """

    level: Literal["error", "warning"]
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.node + ': ' if self.node else ''}{self.text}"


Link = Mapping[str, Any]
"""What `NodeProbe.measure` says of the way from one node to another."""


def odd_versions(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Nodes whose versions are not those of most nodes."""
    findings = []
    names = sorted({name for facts in nodes.values() for name in facts["versions"]})
    for name in names:
        found = {node: facts["versions"].get(name) for node, facts in nodes.items()}
        usual, _ = Counter(found.values()).most_common(1)[0]
        findings += [
            Finding("error", node, f"{name} is {value}, and {usual} on most nodes; install the same everywhere")
            for node, value in found.items()
            if value != usual
        ]
    return findings


def short_of_something(nodes: Mapping[str, Mapping[str, Any]], gpus_per_node: int = 0) -> list[Finding]:
    """Nodes without enough memory or disk, whose name does not resolve, or whose GPUs are too few or not fit."""
    findings = []
    for node, facts in nodes.items():
        for key, least in MIN_FREE.items():
            if facts[key] < least:
                text = f"{NAMES[key]}: {facts[key] / GIB:.1f} GiB free, less than {least / GIB:.0f}"
                findings.append(Finding("warning", node, text))
        if not facts["resolves"]:
            findings.append(Finding("warning", node, "its own host name does not resolve; add it to /etc/hosts"))
        findings += [Finding("error", node, text) for text in _unfit_gpus(facts["gpus"])]
        findings += [
            Finding("warning", node, f"GPU {place} has had errors since boot (Xid {', '.join(map(str, numbers))})")
            for place, numbers in facts["xids"].items()
        ]
        if (shown := len(facts["gpus"])) < gpus_per_node:
            text = f"nvidia-smi shows {shown} GPUs, and a run wants {gpus_per_node}"
            findings.append(Finding("error" if shown else "warning", node, text))  # a container may lack nvidia-smi
    counts = {node: len(facts["gpus"]) for node, facts in nodes.items()}
    usual, _ = Counter(counts.values()).most_common(1)[0]
    return findings + [
        Finding("error", node, f"shows {count} GPUs, and {usual} on most nodes")
        for node, count in counts.items()
        if count != usual
    ]


def _unfit_gpus(gpus: Sequence[Mapping[str, str]]) -> list[str]:
    texts = []
    for gpu in gpus:
        errors, used = gpu.get(ECC, "0"), gpu.get("memory.used", "0")
        if errors.isdigit() and int(errors) > 0:
            texts.append(f"GPU {gpu['index']} has {errors} uncorrected ECC errors; have it looked at")
        if used.isdigit() and int(used) > GPU_USED_MIB:
            texts.append(f"GPU {gpu['index']} has {used} MiB in use by somebody")
    return texts


def skewed_clocks(skews: Mapping[str, float]) -> list[Finding]:
    """Nodes whose clock is not that of most; seconds ahead of the driver's clock, by node."""
    usual = statistics.median(skews.values())
    return [
        Finding("warning", node, f"its clock is {abs(skew - usual):.1f} s {'ahead' if skew > usual else 'behind'}")
        for node, skew in skews.items()
        if abs(skew - usual) > MAX_CLOCK_SKEW_S
    ]


def unshared(path: str, writer: str, problem: str, seen: Mapping[str, bool]) -> list[Finding]:
    """Nodes that do not see what another one wrote to the run directory."""
    if problem:
        return [Finding("error", writer, f"{path} cannot be written: {problem}")]
    return [
        Finding("error", node, f"does not see what {writer} writes to {path}; use a file system that all nodes share")
        for node, there in seen.items()
        if not there
    ]


def bad_links(links: Mapping[tuple[str, str], Link]) -> list[Finding]:
    """Nodes that others do not reach, and nodes all of whose links are slow.

    A broken node spoils all of its links, so the one with the most bad links is named, and its links are set aside,
    until none is left: two nodes that do not reach each other but everyone else are both named.
    """
    broken = {pair: str(link["error"]) for pair, link in links.items() if "error" in link}
    findings = []
    while broken:
        counts = Counter(node for pair in broken for node in pair)
        node, most = counts.most_common(1)[0]
        mine = {pair: error for pair, error in broken.items() if node in pair}
        others = sorted({other for pair in mine for other in pair if other != node})
        named = [node] if len(others) > 1 or most > 2 else [node, *others]
        error = next(iter(mine.values()))
        findings += [
            Finding("error", name, f"no connection with {', '.join(o for o in (*others, node) if o != name)}: {error}")
            for name in named
        ]
        broken = {pair: error for pair, error in broken.items() if node not in pair}
    return findings + _slow_nodes({pair: link for pair, link in links.items() if "error" not in link})


def _slow_nodes(links: Mapping[tuple[str, str], Link]) -> list[Finding]:
    """Nodes whose best link is far below the median of the links that do not touch them."""
    findings = []
    for node in sorted({node for pair in links for node in pair}):
        mine = [link["bytes_per_second"] for pair, link in links.items() if node in pair]
        others = [link["bytes_per_second"] for pair, link in links.items() if node not in pair]
        if others and max(mine) < SLOW_SHARE * statistics.median(others):
            text = (
                f"slow network: {max(mine) / 1e6:,.0f} MB/s at best, "
                f"{statistics.median(others) / 1e6:,.0f} MB/s between the others"
            )
            findings.append(Finding("warning", node, text))
    return findings


def median_bandwidth(links: Mapping[tuple[str, str], Link]) -> float | None:
    """Bytes per second of the median link that works."""
    known = [link["bytes_per_second"] for link in links.values() if "error" not in link]
    return statistics.median(known) if known else None


def slower_than_before(what: str, now: float | None, before: float | None) -> list[Finding]:
    """Whether the cluster's network has become slower; bytes per second of a kind of measurement."""
    if now is None or before is None or now >= BASELINE_SHARE * before:
        return []
    text = f"the network has become slower: {what} {now / 1e6:,.0f} MB/s, {before / 1e6:,.0f} MB/s last time"
    return [Finding("warning", "", text)]
