"""All-reduces between the nodes of a Ray cluster, as a run will make them: over all of them, and over parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.orchestration.bisection import Collectives, Group, bisect
from launcher.orchestration.collective_probe import END_TIMEOUT, CollectiveProbe
from launcher.orchestration.diagnosis import Finding, Link

READY_TIMEOUT_S = 120.0
"""For a process on each node that has imported PyTorch, and has a GPU where there are any."""
END_TIMEOUT_S = 3 * END_TIMEOUT.total_seconds()
"""For a group: it meets, reduces, and tells."""


def examine_collectives(nodes: Mapping[str, Mapping[str, Any]]) -> Collectives:
    """Measure all-reduces over nodes, over NCCL where each has a free GPU, else over gloo.

    Args:
        nodes: of `ray.nodes()`, by the names to call them by.
    """
    on_gpu = all(node["Resources"].get("GPU", 0) >= 1 for node in nodes.values())
    probe_class = ray.remote(CollectiveProbe)
    probes = {
        name: probe_class.options(
            num_cpus=0,
            num_gpus=int(on_gpu),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for name, node in nodes.items()
    }
    addresses = {name: str(node["NodeManagerAddress"]) for name, node in nodes.items()}
    try:
        backends = set(ray.get([probe.backend.remote() for probe in probes.values()], timeout=READY_TIMEOUT_S))
        backend = "nccl" if backends == {"nccl"} else "gloo"

        def measure(groups: Sequence[Group]) -> list[Link]:
            return _measure(groups, probes, addresses, backend)

        return bisect(sorted(nodes), measure)
    except RayError as error:  # a timeout is one
        text = f"no all-reduce was measured: {type(error).__name__} after {READY_TIMEOUT_S:.0f} s"
        return Collectives(findings=[Finding("warning", "", text + (", are all GPUs taken?" if on_gpu else ""))])
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _measure(
    groups: Sequence[Group], probes: Mapping[str, Any], addresses: Mapping[str, str], backend: str
) -> list[Link]:
    """An all-reduce in each group, all at the same time; a group's figure is that of its first node."""
    ports = ray.get([probes[group[0]].meet_here.remote(addresses[group[0]]) for group in groups], timeout=END_TIMEOUT_S)
    asked = [
        [
            probes[name].all_reduce.remote(addresses[group[0]], port, rank, len(group), backend)
            for rank, name in enumerate(group)
        ]
        for group, port in zip(groups, ports, strict=True)
    ]
    flat = [reference for references in asked for reference in references]
    ray.wait(flat, num_returns=len(flat), timeout=END_TIMEOUT_S)
    return [_joined([_answer(reference) for reference in references]) for references in asked]


def _answer(reference: Any) -> Link:
    try:
        link: Link = ray.get(reference, timeout=0)
    except GetTimeoutError:
        return {"error": f"no end within {END_TIMEOUT_S:.0f} s"}
    except RayError as error:
        return {"error": type(error).__name__}
    return link


def _joined(links: Sequence[Link]) -> Link:
    """The first error of a group, else what its first node measured."""
    return next((link for link in links if "error" in link), links[0])
