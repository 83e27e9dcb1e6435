"""Examining a Ray cluster before a run trusts it: one probe a node, every pair of nodes and all-reduces measured."""

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
from launcher.orchestration.bisection import Collectives, rounds
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
        collectives: all-reduces over the nodes that reach each other; none when they were not asked for.
        findings: what is wrong.
        seconds: that it took.
    """

    nodes: Mapping[str, Mapping[str, Any]]
    links: Mapping[tuple[str, str], diagnosis.Link]
    collectives: Collectives
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def bandwidth(self) -> float | None:
        """Of the median link, in bytes per second."""
        return diagnosis.median_bandwidth(self.links)


def examine(
    run_directory: Path,
    expected_nodes: int,
    baseline: Path | None = None,
    gpus_per_node: int = 0,
    *,
    collectives: bool = False,
) -> Examination:
    """Examine the cluster that this process is connected to.

    Args:
        run_directory: that all nodes must see.
        expected_nodes: how many there must be.
        baseline: file with what was measured last time; written anew when nothing is wrong.
        gpus_per_node: that a run wants.
        collectives: measure all-reduces too, for which each node imports PyTorch first.
    """
    began = time.monotonic()
    living, findings = _living(expected_nodes)
    probes = _probes(living)
    nodes, skews = _facts(probes, run_directory, findings)
    findings += diagnosis.odd_versions(nodes) if nodes else []
    findings += diagnosis.short_of_something(nodes, gpus_per_node) if nodes else []
    findings += diagnosis.skewed_clocks(skews) if nodes else []
    answering = {name: probes[name] for name in nodes}
    if len(answering) > 1:
        findings += _shared(answering, run_directory)
    endpoints = {name: (living[name]["NodeManagerAddress"], nodes[name]["port"]) for name in nodes}
    links = _links(answering, endpoints)
    of_links = diagnosis.bad_links(links)
    findings += of_links
    reached = Collectives()
    if collectives:
        from launcher.orchestration.collectives import examine_collectives

        cut_off = {finding.node for finding in of_links if finding.level == "error"}
        reached = examine_collectives({name: living[name] for name in nodes if name not in cut_off})
        findings += reached.findings
    if baseline is not None:
        findings += _compared(baseline, links, reached, all_is_well=not findings)
    for probe in probes.values():
        ray.kill(probe)
    return Examination(nodes, links, reached, tuple(findings), time.monotonic() - began)


def _living(expected: int) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Ray's description of each living node, by host name; and the nodes that are not there."""
    living: dict[str, dict[str, Any]] = {}
    findings = []
    for node in ray.nodes():
        name = node["NodeManagerHostname"]
        if not node["Alive"]:
            findings.append(Finding("warning", name, f"has left the cluster: {node.get('DeathReasonMessage', '')}"))
            continue
        name = name if name not in living else f"{name} ({node['NodeManagerAddress']})"
        living[name] = node
    if len(living) < expected:
        text = f"the profile asks for {expected} nodes, and the cluster has {len(living)}: {', '.join(sorted(living))}"
        findings.append(Finding("error", "", text))
    return living, findings


def _probes(living: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    probe_class = ray.remote(NodeProbe)
    probes = {}
    for name, node in living.items():
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probes[name] = probe_class.options(num_cpus=0, scheduling_strategy=where).remote()
    return probes


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


def _compared(
    baseline: Path, links: Mapping[tuple[str, str], diagnosis.Link], reached: Collectives, *, all_is_well: bool
) -> list[Finding]:
    """What is slower than last time; today's figures are for the next time, if nothing is wrong."""
    whole = reached.whole or {}
    now = {"connection": diagnosis.median_bandwidth(links), "all_reduce": whole.get("bytes_per_second")}
    before = _read_baseline(baseline)
    findings = [
        finding
        for what, figure in now.items()
        for finding in diagnosis.slower_than_before(what.replace("_", "-"), figure, before.get(what))
    ]
    if all_is_well and not findings:
        kept = before | {what: figure for what, figure in now.items() if figure is not None}
        baseline.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(baseline, json.dumps(kept | {"time": time.time()}))
    return findings


def _read_baseline(path: Path) -> dict[str, float]:
    """Bytes per second by kind; empty when nothing was measured before."""
    try:
        return {str(name): float(figure) for name, figure in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
