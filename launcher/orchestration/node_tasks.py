"""Tasks on a given node: whether it answers, where its processes stand (their stacks, by py-spy), and ending one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

DUMP_TIMEOUT_S = 10.0
COLLECT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 5.0


def dump(pid: int) -> str:
    """The stacks of a process on this node, or why there are none."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed on this node"
    # Without --nonblocking py-spy would stop the process first, and wait for ever for one that is stopped already.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"py-spy gave no answer in {DUMP_TIMEOUT_S:.0f} s"
    return done.stdout if done.returncode == 0 else f"py-spy failed: {done.stderr.strip()}"


def is_here() -> bool:
    """What a node is asked that may be gone."""
    return True


def answering(nodes: Sequence[str]) -> set[str]:
    """Which of some nodes, by Ray's ids, run a task within a few seconds."""
    task = ray.remote(is_here)
    asked = {}
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote()] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    found = set()
    for reference in ready:
        with contextlib.suppress(RayError):
            ray.get(reference)
            found.add(asked[reference])
    return found


def end(pid: int) -> None:
    """Kill a process on this node; Ray only asks it to end, and one that is stopped does not hear that."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_silent(placements: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> None:
    """Kill the processes of some ranks, each by a task on its own node, as far as the nodes answer."""
    task = ray.remote(end)
    asked = []
    for rank in ranks:
        where = NodeAffinitySchedulingStrategy(placements[rank]["node_id"], soft=False)
        asked.append(task.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(placements[rank]["pid"]))
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=COLLECT_TIMEOUT_S)


def collect(placements: Sequence[Mapping[str, Any]], ranks: Sequence[int], folder: Path) -> list[Path]:
    """Write the stacks of some ranks to a folder, each taken by a task on the rank's own node.

    Args:
        placements: what `Worker.join` said, by rank.
        ranks: whose stacks.
        folder: for `rank_00013.txt` and so on.

    Returns:
        What was written; less than asked when a node does not answer in time.
    """
    task = ray.remote(dump)
    asked = {}
    for rank in ranks:
        where = NodeAffinitySchedulingStrategy(placements[rank]["node_id"], soft=False)
        asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(placements[rank]["pid"])] = rank
    folder.mkdir(parents=True, exist_ok=True)
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=COLLECT_TIMEOUT_S)
    written = []
    for reference in ready:
        rank = asked[reference]
        try:
            text = ray.get(reference)
        except RayError as error:
            text = f"its node gave no stacks: {error}"
        place = placements[rank]
        path = folder / f"rank_{rank:05d}.txt"
        path.write_text(f"rank {rank}, process {place['pid']} on {place['hostname']}\n{text}\n")
        written.append(path)
    return sorted(written)
