"""Examining a Ray cluster before a run trusts it: one probe a node, and every pair of nodes measured."""

import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.orchestration import diagnosis
from launcher.orchestration.diagnosis import Finding
from launcher.orchestration.probe import NodeProbe
from launcher.run_directory import write_atomically

ANSWER_TIMEOUT_S = 60.0
ROUND_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        nodes: facts by host name.
        links: measurement by (from, to).
        findings: what is wrong.
        seconds: that it took.
    """

    nodes: Mapping[str, Mapping[str, Any]]
    links: Mapping[tuple[str, str], diagnosis.Link]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def bandwidth(self) -> float | None:
        """Of the median link, in bytes per second."""
        return diagnosis.median_bandwidth(self.links)


def examine(
    run_directory: Path, expected_nodes: int, baseline: Path | None = None, gpus_per_node: int = 0
) -> Examination:
    """Examine the cluster that this process is connected to.

    Args:
        run_directory: that all nodes must see.
        expected_nodes: how many there must be.
        baseline: file with what was measured last time; written anew when nothing is wrong.
        gpus_per_node: that a run wants.
    """
    began = time.monotonic()
    probes, addresses, findings = _probes(expected_nodes)
    nodes, skews = _facts(probes, run_directory, findings)
    findings += diagnosis.odd_versions(nodes) if nodes else []
    findings += diagnosis.short_of_something(nodes, gpus_per_node) if nodes else []
    findings += diagnosis.skewed_clocks(skews) if nodes else []
    answering = {name: probes[name] for name in nodes}
    if len(answering) > 1:
        findings += _shared(answering, run_directory)
    links = _links(answering, {name: (addresses[name], nodes[name]["port"]) for name in nodes})
    findings += diagnosis.bad_links(links)
    now = diagnosis.median_bandwidth(links)
    if baseline is not None:
        findings += diagnosis.slower_than_before(now, _read_baseline(baseline))
        if now is not None and not findings:
            baseline.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(baseline, json.dumps({"bytes_per_second": now, "time": time.time()}))
    for probe in probes.values():
        ray.kill(probe)
    return Examination(nodes, links, tuple(findings), time.monotonic() - began)


def _probes(expected: int) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """A probe on each living node, by host name; their addresses; and the nodes that are not there."""
    probe_class = ray.remote(NodeProbe)
    probes, addresses = {}, {}
    findings = []
    for node in ray.nodes():
        name = node["NodeManagerHostname"]
        if not node["Alive"]:
            findings.append(Finding("warning", name, f"has left the cluster: {node.get('DeathReasonMessage', '')}"))
            continue
        name = name if name not in probes else f"{name} ({node['NodeManagerAddress']})"
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probes[name] = probe_class.options(num_cpus=0, scheduling_strategy=where).remote()
        addresses[name] = node["NodeManagerAddress"]
    if len(probes) < expected:
        text = f"the profile asks for {expected} nodes, and the cluster has {len(probes)}: {', '.join(sorted(probes))}"
        findings.append(Finding("error", "", text))
    return probes, addresses, findings


def _facts(
    probes: Mapping[str, Any], run_directory: Path, findings: list[Finding]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Facts by node, and seconds by which its clock is ahead; nodes that do not answer are findings."""
    nodes, skews = {}, {}
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    asked = {name: probe.facts.remote(str(run_directory)) for name, probe in probes.items()}
    for name, reference in asked.items():
        try:
            nodes[name] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except (GetTimeoutError, RayError) as error:
            findings.append(Finding("error", name, f"does not answer: {type(error).__name__}"))
            continue
        before = time.time()
        there = ray.get(probes[name].clock.remote())
        skews[name] = there - (before + time.time()) / 2
    return nodes, skews


def _shared(probes: Mapping[str, Any], run_directory: Path) -> list[Finding]:
    """Whether every node sees what this process, which makes the run directory, writes there."""
    writer = socket.gethostname()
    text, path = secrets.token_hex(8), run_directory / f".doctor-{secrets.token_hex(4)}"
    try:
        path.write_text(text)
    except OSError as error:
        return diagnosis.unshared(str(run_directory), writer, error.strerror or str(error), {})
    asked = {name: probe.read.remote(str(path)) for name, probe in probes.items()}
    seen = {name: ray.get(reference) == text for name, reference in asked.items()}
    path.unlink(missing_ok=True)
    return diagnosis.unshared(str(run_directory), writer, "", seen)


def _links(
    probes: Mapping[str, Any], endpoints: Mapping[str, tuple[str, int]]
) -> dict[tuple[str, str], diagnosis.Link]:
    """Measure every pair, so many at a time that no node is in two: N - 1 rounds."""
    links: dict[tuple[str, str], diagnosis.Link] = {}
    for pairs in rounds(sorted(probes)):
        asked = {probes[one].measure.remote(*endpoints[other]): (one, other) for one, other in pairs}
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ROUND_TIMEOUT_S) if asked else ([], [])
        for reference in ready:
            try:
                links[asked[reference]] = ray.get(reference)
            except RayError as error:
                links[asked[reference]] = {"error": type(error).__name__}
        for reference in late:
            links[asked[reference]] = {"error": f"no end within {ROUND_TIMEOUT_S:.0f} s"}
    return links


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


def _read_baseline(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_bytes())["bytes_per_second"])
    except (OSError, ValueError, KeyError):
        return None
