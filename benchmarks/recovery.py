"""From the SIGKILL of one of two workers to the first step of both again: ours against torchrun and Ray Train.

Every arm trains the same small model on the same batches with DeepSpeed and a checkpoint now and then. A worker, drawn
by the seed, is killed at a moment drawn by the seed, again and again, in one long run an arm.

    zerofleet warm   spare workers wait
    zerofleet cold   fault_tolerance.warm_workers is false
    torchrun         --max-restarts
    ray train        TorchTrainer with a FailureConfig

    python benchmarks/recovery.py [--kills 20] [--json]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import common
import psutil
from common import BIN, HERE, WORKERS, Bench, Setting, Spread

ARMS = ("zerofleet warm", "zerofleet cold", "torchrun", "ray train")
SAVE_STEPS = 50
RECOVERY_TIMEOUT_S = 240.0
SPARES_S = 30.0
"""How long after a recovery the next kill waits at least in all arms, so that spares are there where there are any."""


class Arm:
    """A run that is killed and watched.

    Args:
        bench: recipe and job.
        name: of the arm.
    """

    def __init__(self, bench: Bench, name: str) -> None:
        self.folder = bench.folder / name.replace(" ", "_")
        self.folder.mkdir()
        self.ours = name.startswith("zerofleet")
        if self.ours:
            warm = str(name == "zerofleet warm").lower()
            overrides: tuple[str, ...] = (
                "max_steps=1000000",
                f"save_steps={SAVE_STEPS}",
                "max_restarts=1000",
                "logging_steps=1",
            )
            overrides += (f"warm_workers={warm}", "warm_workers_after_seconds=1", "exclude_node_after=null")
            self.command = [str(BIN / "zerofleet"), "run", str(bench.recipe), *overrides, "--run-dir", str(self.folder)]
            self.records = self.folder / "metrics.jsonl"
        else:
            job = bench.folder / f"{self.folder.name}.json"
            job.write_text(json.dumps({**bench.job, "folder": str(self.folder), "save_steps": SAVE_STEPS}))
            self.records = self.folder / "records.jsonl"
            script = str(HERE / "recover_train.py")
            torchrun = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={WORKERS}", "--max-restarts=1000"]
            self.command = (
                [*torchrun, script, str(job)] if name == "torchrun" else [sys.executable, script, str(job), "--ray"]
            )

    def last_record(self) -> dict[str, Any]:
        """The newest step that rank 0 wrote."""
        try:
            with self.records.open("rb") as stream:
                stream.seek(max(0, self.records.stat().st_size - 4096))
                lines = stream.read().split(b"\n")[:-1]
        except OSError:
            return {"step": 0, "time": 0.0}
        return dict(json.loads(lines[-1])) if lines else {"step": 0, "time": 0.0}

    def events(self, state: str) -> list[dict[str, Any]]:
        """Our run's events of a state."""
        path = self.folder / "events.jsonl"
        found = common.read_records(path) if path.exists() else []
        return [event for event in found if event["state"] == state]

    def pid(self, rank: int) -> int:
        """Of a rank's process now."""
        if self.ours:
            return int(self.events("running")[-1]["workers"][rank]["pid"])
        return int((self.folder / f"pid_{rank}").read_text())

    def steps_since(self, attempt: object) -> bool:
        """Whether a step was made by another attempt than this one."""
        record = self.last_record()
        if not self.ours:
            return bool(record.get("pid", attempt) != attempt)
        running = self.events("running")
        return len(running) > int(str(attempt)) and bool(record["time"] > running[-1]["time"])

    def attempt(self) -> object:
        """What tells this attempt from another one."""
        return len(self.events("running")) if self.ours else self.last_record().get("pid")


def wait(condition: Any, what: str, process: subprocess.Popen[bytes]) -> None:
    """Poll often; raises when the run ends or takes too long."""
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no {what}")
        time.sleep(0.02)


def kill_again_and_again(bench: Bench, name: str, kills: int, seed: int) -> list[dict[str, float]]:
    """Run one arm; returns a figure for each kill: seconds to the first step, and ours to notice."""
    arm, dice, figures = Arm(bench, name), random.Random(seed), []
    with (bench.folder / f"{arm.folder.name}.log").open("wb") as log:
        process = subprocess.Popen(
            arm.command, env=bench.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait(lambda: arm.last_record()["step"] >= SAVE_STEPS + 5, "first steps", process)
            for number in range(kills):
                time.sleep(SPARES_S + dice.uniform(0, 5))
                attempt, victim = arm.attempt(), dice.randrange(WORKERS)
                killed = time.time()
                os.kill(arm.pid(victim), signal.SIGKILL)
                wait(lambda attempt=attempt: arm.steps_since(attempt), f"recovery {number}", process)
                first = time.time()
                figure = {"seconds": first - killed, "rank": float(victim)}
                if arm.ours:
                    figure["noticed"] = arm.events("recovering")[-1]["failed_at"] - killed
                figures.append(figure)
                print(f"{name} {number + 1}/{kills}: {figure}", file=sys.stderr)
        except RuntimeError as error:
            print(f"{name}: {error} after {len(figures)} recoveries", file=sys.stderr)
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            common.end_processes([*([psutil.Process(process.pid)] if process.poll() is None else []), *children])
    return figures


def measure(setting: Setting, kills: int, seed: int, arms: tuple[str, ...]) -> dict[str, Any]:
    """Run all arms, one after another; returns the figures."""
    result: dict[str, Any] = {"machine": common.machine(), "setting": asdict(setting), "kills": kills, "arms": {}}
    with common.bench(setting, initial_weights=False) as bench:
        for arm in arms:
            figures = kill_again_and_again(bench, arm, kills, seed)
            found: dict[str, Any] = {"recovered": len(figures), "figures": figures}
            if figures:
                found["seconds"] = asdict(Spread.of([figure["seconds"] for figure in figures]))
            if figures and "noticed" in figures[0]:
                found["noticed"] = asdict(Spread.of([figure["noticed"] for figure in figures]))
            result["arms"][arm] = found
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print what `measure` returned."""
    print(f"{result['kills']} kills an arm, {WORKERS} gloo ranks, median (smallest - largest)")
    for arm, found in result["arms"].items():
        if "seconds" not in found:
            print(f"  {arm:<18}{found['recovered']}/{result['kills']} recovered")
            continue
        noticed = f", noticed after {Spread(**found['noticed']).text('.2f')} s" if "noticed" in found else ""
        seconds = Spread(**found["seconds"]).text(".2f")
        print(f"  {arm:<18}{found['recovered']}/{result['kills']} recovered, first step after {seconds} s{noticed}")
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; torch {machine['torch']}, "
          f"deepspeed {machine['deepspeed']}, ray {machine['ray']}")  # fmt: skip


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    arguments = parser.parse_args()
    setting = Setting(
        steps=50, logging_steps=1, hidden_size=128, num_hidden_layers=2, sequence_length=64, micro_batch_size=2
    )
    result = measure(setting, arguments.kills, arguments.seed, tuple(arguments.arms))
    print(json.dumps(result, indent=1)) if arguments.json else print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
