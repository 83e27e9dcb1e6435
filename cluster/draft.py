"""A first profile, from what the machine tells: its GPUs, and the partitions that Slurm shows."""

import json
import os
import subprocess
from collections.abc import Callable
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


def draft(backend: str, accelerator: Callable[[str], str | None] = lambda name: None) -> str:
    """A profile as YAML.

    Args:
        backend: of the profile.
        accelerator: from a GPU's name as nvidia-smi says it to that in a profile, if it has one.

    Raises:
        BackendError: no such backend, or Slurm does not answer.
    """
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "slurm":
        return _slurm(partitions())
    gpus, cores = visible_gpus(), os.cpu_count() or 1
    workers = gpus or 2
    kinds = gpu_kinds() if gpus else []
    has = f", {gpus} GPUs: {', '.join(kinds)}" if kinds else ""
    lines = [
        f"description: {json.dumps(f'Drafted on {os.uname().nodename}{has}')}",
        f"backend: {backend}",
        "nodes: 1",
        f"workers_per_node: {workers}",
        f"device: {'cuda' if gpus else 'cpu'}",
        f"cpus_per_worker: {max(1, cores // workers)}",
    ]
    if len(kinds) == 1 and (name := accelerator(kinds[0])) is not None:
        lines.append(f"accelerator: {name}")
    if backend == "ray":
        lines.append("# address: 10.0.0.1:6379        # default: RAY_ADDRESS")
    if backend == "ssh":
        lines += ["ssh:", f"  hosts: [{os.uname().nodename}]"]
    return "\n".join(lines) + "\n"


def partitions() -> list[Partition]:
    """The partitions that this user sees, the default one first.

    Raises:
        BackendError: Slurm does not answer, or shows none that is of use.
    """
    found: dict[str, Partition] = {}
    lines = run_slurm("sinfo", "--noheader", "--format=%P|%D|%c|%G|%l|%a").splitlines()
    for parts in (line.split("|") for line in lines):
        if len(parts) != 6 or parts[-1].strip() != "up" or parts[1].strip() == "0":  # a site's greeting, or no use
            continue
        name, nodes, cpus, gres, limit = (part.strip() for part in parts[:-1])
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
        raise BackendError("sinfo shows no partition that is up and has nodes")
    return sorted(found.values(), key=lambda partition: not partition.is_default)


def count_gpus(gres: str) -> int:
    """GPUs in Slurm's notation: `gpu:4`, `gpu:a100:8(S:0-1)`, `(null)`; several kinds are added."""
    total = 0
    for part in gres.split(","):
        words = part.partition("(")[0].split(":")
        if words[0] == "gpu":
            total += int(words[-1]) if words[-1].isdecimal() else 1
    return total


def gpu_kinds() -> list[str]:
    """What nvidia-smi calls the GPUs of this machine, each kind once; nothing where it does not answer."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip() for line in shown.splitlines() if line.strip()})


def _slurm(found: list[Partition]) -> str:
    chosen = found[0]
    workers = chosen.gpus or 1
    limit = "24:00:00" if chosen.time_limit == "infinite" else chosen.time_limit
    others = [
        f"{other.name} ({other.nodes} nodes, {other.cpus} CPUs, {other.gpus} GPUs, {other.time_limit})"
        for other in found[1:]
    ]
    told = f"Partition {chosen.name}, {chosen.nodes} nodes of {chosen.cpus} CPUs and {chosen.gpus} GPUs"
    lines = [
        f"description: {json.dumps(told)}",
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
