"""What the commands that only look and compute cost: whole processes, against Python importing the same libraries.

The peer is what no command line written with these libraries can be faster than: a Python that imports typer, pydantic
and ruamel.yaml and ends. Looks at jobs read a registry of 1,000 records of a Slurm whose `squeue` answers at once, so
that what is measured is ours. Arms take turns; processor time is counted beside the wall's: a busy machine adds less
to it.

    python benchmarks/command_time.py [--rounds 7] [--json]
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
from common import BIN, Spread

from cluster import registry
from cluster.types import JobRecord

PEER = "python, the libraries"
RECORDS = 1000


def arms() -> dict[str, list[str]]:
    """Every command by its name."""
    zerofleet = str(BIN / "zerofleet")
    return {
        PEER: [sys.executable, "-c", "import typer, pydantic, ruamel.yaml"],
        "zerofleet --help": [zerofleet, "--help"],
        "zerofleet plan": [zerofleet, "plan", "quickstart", "--json"],
        "zerofleet jobs": [zerofleet, "jobs"],
        "zerofleet status": [zerofleet, "status", "job00500"],
        "zerofleet logs": [zerofleet, "logs", "job00500"],
    }


def fill(folder: Path) -> dict[str, str]:
    """Make a registry of ended jobs and a `squeue` that knows none; returns the environment that sees both."""
    os.environ["XDG_STATE_HOME"] = str(folder)
    job = folder / "run" / "jobs" / "0001"
    (job / "starts" / "1").mkdir(parents=True)
    for index in range(RECORDS):
        record = JobRecord(
            id=f"job{index:05d}",
            name="quickstart",
            backend="slurm",
            backend_id=str(index),
            run_directory=str(folder / "run"),
            job_directory=str(job),
            argv=("zerofleet", "submit", "quickstart"),
            submitted=float(index),
            profile="slurm",
            nodes=2,
        )
        registry.add(record)
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\n")
    squeue.chmod(0o755)
    return {**os.environ, "PATH": f"{squeue.parent}:{os.environ['PATH']}"}


def cost(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall and processor seconds of one process and its children.

    Raises:
        RuntimeError: it did not end with 0.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{errors.decode(errors='replace')}")
    return {"wall": seconds, "processor": usage.ru_utime + usage.ru_stime}


def measure(rounds: int) -> dict[str, Any]:
    """Run one round that does not count (it fills the page cache), then all others; returns the figures."""
    taken: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="zfb-") as temporary:
        folder = Path(temporary)
        environment = fill(folder)
        commands = arms()
        for number in range(rounds + 1):
            figures = {arm: cost(commands[arm], environment) for arm in common.rotated(list(commands), number)}
            if number:
                taken.append(figures)
    return {
        "machine": common.machine(),
        "records": RECORDS,
        "rounds": taken,
        "seconds": {
            arm: {kind: asdict(Spread.of([figures[arm][kind] for figures in taken])) for kind in ("wall", "processor")}
            for arm in commands
        },
        "ratios": {
            arm: asdict(Spread.of([figures[arm]["wall"] / figures[PEER]["wall"] for figures in taken]))
            for arm in commands
            if arm != PEER
        },
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what `measure` returned."""
    print(f"{len(result['rounds'])} rounds by turns, median (smallest - largest); {result['records']} job records")
    print(f"{'':<26}{'wall, s':<24}{'processor, s':<24}wall / peer's")
    for arm, seconds in result["seconds"].items():
        wall, processor = (Spread(**seconds[kind]).text(".2f") for kind in ("wall", "processor"))
        ratio = "" if arm == PEER else Spread(**result["ratios"][arm]).text(".2f")
        print(f"  {arm:<24}{wall:<24}{processor:<24}{ratio}")
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; python {machine['python']}")


def main() -> int:
    """Parse the command line and run."""
    arguments = common.command_line(__doc__).parse_args()
    return common.show(measure(arguments.rounds), arguments, print_table)


if __name__ == "__main__":
    sys.exit(main())
