"""From the SIGKILL of one of two workers to the first step of both again: ours against torchrun and Ray Train.

Every arm trains the same small model on the same batches with DeepSpeed and a checkpoint now and then. A worker, drawn
by the seed, is killed at a moment drawn by the seed, again and again. An arm that does not recover within two minutes
has failed to; it is started anew for the next kill. Arms take turns: in each round every arm is started and killed a
share of its times.

    zerofleet warm   spare workers wait; the kill waits for them, as failures are hours apart
    zerofleet memory warm spares, and the state in host memory every ten steps (fault_tolerance.memory_checkpoint)
    zerofleet cold   fault_tolerance.warm_workers is false
    torchrun         --max-restarts, with a rendezvous store of each attempt's own
    ray train        TorchTrainer with a FailureConfig

    python benchmarks/recovery.py [--kills 20] [--rounds 2] [--json]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import common
import psutil
from common import BIN, HERE, WORKERS, Bench, Setting, Spread

ARMS = ("zerofleet warm", "zerofleet memory", "zerofleet cold", "torchrun", "ray train")
SAVE_STEPS = 50
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For torchrun, whose restarts otherwise read the addresses of the attempt before in the agent's store and fail, again
and again (pytorch issue 135712, seen with gloo on torch 2.13): of fourteen kills, eight were not recovered from in two
minutes. Nobody else reads it."""
RECOVERY_TIMEOUT_S = 120.0
POLL_S = 0.01
LEDGER_S = 30.0
"""In which our driver writes what the last recovery was spent on: it does so every few seconds."""
START_TIMEOUT_S = 240.0
SETTLE_S = (4.0, 8.0)
"""How long an arm trains at least before each kill: drawn from between these."""


class Arm:
    """A run that is killed and watched.

    Args:
        bench: recipe and job.
        name: of the arm.
        number: how often it was started before.
    """

    def __init__(self, bench: Bench, name: str, number: int) -> None:
        self.name = name
        self.folder = bench.folder / f"{name.replace(' ', '_')}_{number}"
        self.folder.mkdir()
        self.log = bench.folder / f"{self.folder.name}.log"
        self.ours = name.startswith("zerofleet")
        self.records = self.folder / ("metrics.jsonl" if self.ours else "records.jsonl")
        if self.ours:
            warm = ("warm_workers=true", "warm_workers_after_seconds=1")
            kinds: dict[str, tuple[str, ...]] = {
                "zerofleet warm": warm,
                "zerofleet memory": (*warm, "fault_tolerance.memory_checkpoint.every_steps=10"),
                "zerofleet cold": ("warm_workers=false",),
            }
            overrides = (
                *kinds[name],
                *("max_steps=1000000", f"save_steps={SAVE_STEPS}", "logging_steps=1"),
                *("max_restarts=1000", "exclude_node_after=null"),
            )
            command = [str(BIN / "zerofleet"), "run", str(bench.recipe), *overrides, "--run-dir", str(self.folder)]
        else:
            job = bench.folder / f"{self.folder.name}.json"
            job.write_text(json.dumps({**bench.job, "folder": str(self.folder), "save_steps": SAVE_STEPS}))
            script = str(HERE / "recover_train.py")
            torchrun = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={WORKERS}", "--max-restarts=1000"]
            command = (
                [*torchrun, script, str(job)] if name == "torchrun" else [sys.executable, script, str(job), "--ray"]
            )
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=bench.environment | OWN_STORE,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        """End the run and all that it started."""
        if self.process.poll() is None:
            process = psutil.Process(self.process.pid)
            common.end_processes([process, *process.children(recursive=True)])

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

    def pids(self) -> list[int]:
        """Of the ranks' processes now."""
        if self.ours:
            return [int(worker["pid"]) for worker in self.events("running")[-1]["workers"]]
        return [int((self.folder / f"pid_{rank}").read_text()) for rank in range(WORKERS)]

    def has_saved(self) -> bool:
        """Whether there is a checkpoint to go back to."""
        return bool(self.last_record()["step"] >= SAVE_STEPS + 5)

    def is_ready(self) -> bool:
        """Whether as many spares wait as there are workers, where there are any."""
        if self.name not in ("zerofleet warm", "zerofleet memory"):
            return True
        warm = {log for log in (self.folder / "logs").glob("spare_*") if "warm" in log.read_text()}
        waiting = {int(log.stem.rpartition("_")[2]) for log in warm} - set(self.pids())
        return sum(psutil.pid_exists(pid) for pid in waiting) >= WORKERS

    def attempt(self) -> object:
        """What tells this attempt from another one."""
        return len(self.events("running")) if self.ours else self.last_record().get("pid")

    def steps_since(self, attempt: object) -> bool:
        """Whether a step was made by another attempt than this one."""
        record = self.last_record()
        if not self.ours:
            return bool(record.get("pid", attempt) != attempt)
        running = self.events("running")
        return len(running) > int(str(attempt)) and bool(record["time"] > running[-1]["time"])

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = RECOVERY_TIMEOUT_S) -> None:
        """Poll often.

        Raises:
            RuntimeError: the run ended, or takes too long.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {what}; the log ends with\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(POLL_S)

    def kill(self, victim: int) -> dict[str, float]:
        """Kill a rank; returns seconds to the next step of all, and to our notice.

        Raises:
            RuntimeError: there was none.
        """
        attempt = self.attempt()
        killed = time.time()
        os.kill(self.pids()[victim], signal.SIGKILL)
        self.wait(lambda: self.steps_since(attempt), "recovery")
        figure = {"seconds": time.time() - killed, "rank": float(victim)}
        if self.ours:
            figure["noticed"] = self.events("recovering")[-1]["failed_at"] - killed
        return figure

    def parts(self) -> dict[str, float]:
        """Where our recoveries' time went: seconds each."""
        from launcher.orchestration.journal import read_account
        from launcher.run_directory import RunDirectory

        found = read_account(RunDirectory(self.folder))
        count = max(1, len(found.incidents))
        return {name: seconds / count for name, seconds in found.seconds.items() if name.startswith("recovery")}


def kill_again_and_again(bench: Bench, name: str, numbers: range, seed: int) -> dict[str, Any]:
    """Run one arm for one round; returns a figure for each kill that it recovered from."""
    dice = random.Random(f"{seed}/{numbers.start}")  # the same victims and moments for every arm
    figures: list[dict[str, float]] = []
    arm: Arm | None = None
    parts: dict[str, float] = {}
    for number in numbers:
        victim, pause = dice.randrange(WORKERS), dice.uniform(*SETTLE_S)
        try:
            if arm is None:
                arm = Arm(bench, name, number)
                arm.wait(arm.has_saved, "first steps", START_TIMEOUT_S)
            time.sleep(pause)
            arm.wait(arm.is_ready, "spares")
            figures.append(arm.kill(victim))
            print(f"{name} {number + 1}: {figures[-1]}", file=sys.stderr)
        except RuntimeError as error:
            print(f"{name} {number + 1}: {error}", file=sys.stderr)
            if arm is not None:
                arm.end()
            arm = None
    if arm is not None:
        if arm.ours:
            deadline = time.monotonic() + LEDGER_S
            while "recovery: load" not in (parts := arm.parts()) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        arm.end()
    return {"figures": figures, "parts": parts}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What an arm's rounds come to."""
    figures = [figure for found in rounds for figure in found["figures"]]
    found: dict[str, Any] = {"recovered": len(figures), "figures": figures, "parts": [one["parts"] for one in rounds]}
    for name in ("seconds", "noticed"):
        if values := [figure[name] for figure in figures if name in figure]:
            found[name] = asdict(Spread.of(values))
    return found


def measure(setting: Setting, kills: int, rounds: int, seed: int, arms: tuple[str, ...]) -> dict[str, Any]:
    """Run all arms, taking turns; returns the figures."""
    result: dict[str, Any] = {"machine": common.machine(), "setting": asdict(setting), "kills": kills}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with common.bench(setting, initial_weights=False) as bench:
        for number in range(rounds):
            share = range(number * kills // rounds, (number + 1) * kills // rounds)
            for arm in arms:
                found[arm].append(kill_again_and_again(bench, arm, share, seed))
    result["arms"] = {arm: summary(parts) for arm, parts in found.items()}
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
        for parts in filter(None, found["parts"]):
            print("    " + ", ".join(f"{name.partition(': ')[2]} {spent:.2f}" for name, spent in parts.items()))
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; torch {machine['torch']}, "
          f"deepspeed {machine['deepspeed']}, ray {machine['ray']}")  # fmt: skip


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    arguments = parser.parse_args()
    setting = Setting(
        steps=50, logging_steps=1, hidden_size=128, num_hidden_layers=2, sequence_length=64, micro_batch_size=2
    )
    result = measure(setting, arguments.kills, arguments.rounds, arguments.seed, tuple(arguments.arms))
    print(json.dumps(result, indent=1)) if arguments.json else print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
