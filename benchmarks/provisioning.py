"""From `zerofleet submit` to the first training step on a real, idle Slurm of two nodes, against `ray start` by hand.

Both arms are batch jobs of one Slurm, which the benchmark starts on loopback (tests/support/slurm_cluster.py) and ends.
By hand is what a person types in the allocation: `ray start --head` on the first node and, when that is up,
`ray start --address` on the second; it ends when the second has joined. Ours is a run of two workers, one a node, whose
data is prepared. Both are counted from the first line of the batch script, so the scheduler's time is in neither, and
submitit's and our own start is in ours. Arms take turns; ratios are taken within a round.

    zerofleet, nodes joined    all nodes of our Ray are up
    zerofleet, worker group    and the driver asks Ray for the worker group: everything of ours that comes before it

    python benchmarks/provisioning.py [--rounds 5] [--json]
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import psutil
from common import BIN, HERE, Bench, Setting, Spread

BY_HAND, JOINED, WORKER_GROUP = "ray start by hand", "zerofleet, nodes joined", "zerofleet, worker group"
RATIOS = ((JOINED, BY_HAND), (WORKER_GROUP, BY_HAND))
ALLOWED = 1.5
"""Of the second ratio."""
STARTED = "Ray runtime started"
CLUSTER_TIMEOUT_S = 60.0
JOB_TIMEOUT_S = 300.0

SCRIPT = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --output={folder}/batch.log
date +%s.%N > {folder}/began
{head} > {folder}/head.log 2>&1 &
until grep -q "{started}" {folder}/head.log; do sleep 0.05; done
srun --nodes=1 --ntasks=1 --nodelist=n2 {worker} > {folder}/worker.log 2>&1 &
until grep -q "{started}" {folder}/worker.log; do sleep 0.05; done
date +%s.%N > {folder}/joined.new
mv {folder}/joined.new {folder}/joined
sleep infinity
"""


@dataclass(frozen=True)
class Lab:
    """A Slurm of the benchmark's own.

    Attributes:
        bench: the recipe and its data.
        environment: of every command.
    """

    bench: Bench
    environment: dict[str, str]

    def command(self, *command: str) -> str:
        """Run one of Slurm's commands or ours."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def end(self, job_id: str) -> None:
        """End a job, and what Slurm without cgroups leaves of it: processes that carry its id."""
        self.command("scancel", "--quiet", job_id)
        wait_for(lambda: not self.command("squeue", "--noheader", "--jobs", job_id), f"end of job {job_id}", 60)
        mine = {"SLURM_JOB_ID": job_id, "SLURM_CONF": self.environment["SLURM_CONF"]}
        common.end_processes([process for process in psutil.process_iter() if mine.items() <= _environ(process)])


def _environ(process: psutil.Process) -> Any:
    try:
        return process.environ().items()
    except psutil.Error:
        return {}.items()


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float) -> None:
    """Poll until a condition holds.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {timeout_s:.0f} s")
        time.sleep(0.1)


@contextmanager
def lab(bench: Bench) -> Iterator[Lab]:
    """Start a Slurm of two nodes; end it on leaving."""
    with tempfile.TemporaryDirectory(prefix="zfslurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants to be able to enter it as anybody
        command = [sys.executable, "-m", "tests.support.slurm_cluster", str(folder), "--nodes", "2"]
        cluster = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
        try:
            assert cluster.stdout is not None
            line = cluster.stdout.readline()
            if not line.startswith("export SLURM_CONF="):
                raise RuntimeError("Slurm did not start; is it installed? See .ci/apt-packages.txt")
            configuration = line.strip().partition("=")[2]
            state = {"XDG_STATE_HOME": str(bench.folder / "state"), "SLURM_CONF": configuration}
            # Slurm gives a job its submitter's environment: all arms have the same.
            environment = bench.environment | state
            yield Lab(bench, environment)
        finally:
            cluster.terminate()
            cluster.wait(CLUSTER_TIMEOUT_S)


def by_hand(lab: Lab, number: int) -> dict[str, float]:
    """Seconds of one start of Ray by hand."""
    folder = lab.bench.folder / f"hand_{number}"
    folder.mkdir()
    address = f"127.0.1.1:{common.free_port()}"
    head = ("--head", f"--port={address.partition(':')[2]}", f"--ray-client-server-port={common.free_port()}")
    commands = {
        "head": ray_start("127.0.1.1", *head, "--include-dashboard=false", f"--temp-dir={lab.bench.folder}/r"),
        "worker": ray_start("127.0.1.2", f"--address={address}"),
    }
    script = SCRIPT.format(folder=folder, started=STARTED, **commands)
    (folder / "script.sh").write_text(script)
    job_id = lab.command("sbatch", "--parsable", str(folder / "script.sh"))
    try:
        wait_for((folder / "joined").exists, f"Ray by hand, see {folder}", JOB_TIMEOUT_S)
    finally:
        lab.end(job_id)
    return {BY_HAND: float((folder / "joined").read_text()) - float((folder / "began").read_text())}


def ray_start(address: str, *options: str) -> str:
    """The command as a person types it; with ports of its own, because both nodes are on this machine."""
    ports = (f"--dashboard-agent-listen-port={common.free_port()}", "--min-worker-port=0", "--max-worker-port=0")
    common_options = ("--block", "--num-cpus=1", "--disable-usage-stats", f"--node-ip-address={address}")
    return shlex.join([str(BIN / "ray"), "start", *options, *common_options, *ports])


def ours(lab: Lab, number: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one start of ours, and the phases as `zerofleet status --json` gives them."""
    run = lab.bench.folder / f"ours_{number}"
    began, profile = lab.bench.folder / f"ours_{number}.began", lab.bench.folder / f"ours_{number}.yaml"
    settings = {"backend": "slurm", "nodes": 2, "workers_per_node": 1, "device": "cpu"}
    slurm = {"time_limit": "30", "setup": [f"date +%s.%N > {began}"]}
    profile.write_text(json.dumps({**settings, "slurm": slurm}))
    zerofleet = str(BIN / "zerofleet")
    options = ("--profile", str(profile), "--run-dir", str(run), "--json")
    record = json.loads(lab.command(zerofleet, "submit", str(lab.bench.recipe), *options))
    try:
        wait_for(lambda: _is_over(lab, record["id"]), f"end of our job, see {run}", JOB_TIMEOUT_S)
        status = json.loads(lab.command(zerofleet, "status", record["id"], "--json"))
        if status["state"] != "COMPLETED":
            raise RuntimeError(f"{status}\n{lab.command(zerofleet, 'logs', record['id'])}")
    finally:
        lab.end(record["backend_id"])
    moments = json.loads((Path(record["job_directory"]) / "start_001" / "phases.json").read_text())
    moments |= json.loads((run / "progress.json").read_text())["moments"]
    start = float(began.read_text())
    figures = {JOINED: moments["nodes_joined"] - start, WORKER_GROUP: moments["starting"] - start}
    return figures, status["phases"]


def _is_over(lab: Lab, job: str) -> bool:
    return json.loads(lab.command(str(BIN / "zerofleet"), "status", job, "--json"))["state"] not in (
        "PENDING",
        "RUNNING",
    )


def measure(rounds: int) -> dict[str, Any]:
    """Run one round that does not count (it fills the page cache), then all others; returns the figures."""
    setting = Setting(
        steps=3, logging_steps=1, hidden_size=64, num_hidden_layers=2, sequence_length=64, micro_batch_size=2
    )
    result: dict[str, Any] = {"machine": common.machine(), "rounds": [], "phases": []}
    with common.bench(setting, initial_weights=False) as bench, lab(bench) as slurm:
        for number in range(rounds + 1):
            hand_first = number % 2 == 0
            figures = by_hand(slurm, number) if hand_first else {}
            own, phases = ours(slurm, number)
            figures |= own | ({} if hand_first else by_hand(slurm, number))
            print(f"round {number}/{rounds}: {figures} {phases}", file=sys.stderr)
            if number:
                result["rounds"].append(figures)
                result["phases"].append(phases)
    return result | summarise(result)


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, and of the rounds' own ratios."""
    rounds, phases = result["rounds"], result["phases"]
    return {
        "seconds": {
            name: asdict(Spread.of([figures[name] for figures in rounds])) for name in (BY_HAND, JOINED, WORKER_GROUP)
        },
        "ratios": {
            f"{over} / {under}": asdict(Spread.of([figures[over] / figures[under] for figures in rounds]))
            for over, under in RATIOS
        },
        "median_phases": {name: Spread.of([table[name] for table in phases]).median for name in phases[0]},
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what `measure` returned."""
    print(f"{len(result['rounds'])} rounds by turns on a real Slurm of two nodes, median (smallest - largest)")
    print("from the first line of the batch script, seconds")
    for arm, spread in result["seconds"].items():
        print(f"  {arm:<48}{Spread(**spread).text('.2f')}")
    print(f"ratio within a round; at most {ALLOWED} is asked")
    for pair, spread in result["ratios"].items():
        print(f"  {pair:<48}{Spread(**spread).text('.2f')}")
    print("from submit to the first step, seconds (zerofleet status --json)")
    for phase, seconds in result["median_phases"].items():
        print(f"  {phase:<48}{seconds:.2f}")
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; ray {machine['ray']}")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    arguments = parser.parse_args()
    os.umask(0o022)
    result = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
