"""A first profile, from what the machine tells: its GPUs, and the partitions that Slurm shows."""

import json
import os
from dataclasses import dataclass

from cluster.errors import BackendError
from cluster.profile import visible_gpus
from cluster.slurm_states import run_slurm

BACKENDS = ("local", "ray", "slurm", "ssh")


@dataclass(frozen=True)
class Partition:
    """What sinfo says of a partition.

    Attributes:
        name: of it.
        is_default: whether jobs go there that name none.
        nodes: how many it has.
        cpus: of its smallest node.
        gpus: of its smallest node, by Gres.
        time_limit: the longest a job may take, in Slurm's form.
    """

    name: str
    is_default: bool
    nodes: int
    cpus: int
    gpus: int
    time_limit: str


def draft(backend: str) -> str:
    """A profile as YAML.

    Raises:
        BackendError: no such backend, or Slurm does not answer.
    """
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "slurm":
        return _slurm(partitions())
    gpus, cores = visible_gpus(), os.cpu_count() or 1
    workers = gpus or 2
    lines = [
        f"description: Drafted on {os.uname().nodename}",
        f"backend: {backend}",
        "nodes: 1",
        f"workers_per_node: {workers}",
        f"device: {'cuda' if gpus else 'cpu'}",
        f"cpus_per_worker: {max(1, cores // workers)}",
    ]
    if backend == "ray":
        lines.append("# address: 10.0.0.1:6379        # default: RAY_ADDRESS")
    if backend == "ssh":
        lines += ["ssh:", f"  hosts: [{os.uname().nodename}]"]
    return "\n".join(lines) + "\n"


def partitions() -> list[Partition]:
    """The partitions that this user sees, the default one first.

    Raises:
        BackendError: Slurm does not answer, or shows none.
    """
    found: dict[str, Partition] = {}
    for line in run_slurm("sinfo", "--noheader", "--format=%P|%D|%c|%G|%l").splitlines():
        name, nodes, cpus, gres, limit = (part.strip() for part in line.split("|"))
        plain = name.rstrip("*")
        before = found.get(plain)
        new = Partition(plain, name.endswith("*"), int(nodes), int(cpus.rstrip("+")), count_gpus(gres), limit)
        if before is not None:  # a line for each kind of node
            new = Partition(
                plain,
                new.is_default,
                before.nodes + new.nodes,
                min(before.cpus, new.cpus),
                min(before.gpus, new.gpus),
                limit,
            )
        found[plain] = new
    if not found:
        raise BackendError("sinfo shows no partition")
    return sorted(found.values(), key=lambda partition: not partition.is_default)


def count_gpus(gres: str) -> int:
    """GPUs in Slurm's notation: `gpu:4`, `gpu:a100:8(S:0-1)`, `(null)`; several kinds are added."""
    total = 0
    for part in gres.split(","):
        words = part.partition("(")[0].split(":")
        if words[0] == "gpu":
            total += int(words[-1]) if words[-1].isdecimal() else 1
    return total


def _slurm(found: list[Partition]) -> str:
    chosen = found[0]
    workers = chosen.gpus or 1
    limit = "24:00:00" if chosen.time_limit == "infinite" else chosen.time_limit
    others = [
        f"{other.name} ({other.nodes} nodes, {other.cpus} CPUs, {other.gpus} GPUs, {other.time_limit})"
        for other in found[1:]
    ]
    lines = [
        f"description: Partition {chosen.name}, {chosen.nodes} nodes of {chosen.cpus} CPUs and {chosen.gpus} GPUs",
        "backend: slurm",
        f"nodes: {min(2, chosen.nodes)}",
        f"workers_per_node: {workers}",
        f"device: {'cuda' if chosen.gpus else 'cpu'}",
        f"cpus_per_worker: {max(1, chosen.cpus // workers)}",
        "slurm:",
        f"  partition: {json.dumps(chosen.name)}",
        f"  time_limit: {json.dumps(limit)}",
        *(f"  # also there: {other}" for other in others),
    ]
    return "\n".join(lines) + "\n"
