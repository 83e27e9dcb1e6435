"""What a plan costs, whole processes: every shipped recipe, 405B on 16,384 GPUs, and a search for 70B on 1,024 GPUs.

Each process also says whether torch, deepspeed, ray or transformers came in. Processor time is counted beside the
wall's: a busy machine adds less to it.

    python benchmarks/plan_time.py [--rounds 5] [--json]
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from typing import Any

from common import HERE, Spread, machine

HEAVY = ("torch", "deepspeed", "ray", "transformers", "datasets")
SCRIPT = """
import sys
from launcher.cli.main import main
try:
    main()
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def commands() -> dict[str, list[str]]:
    """Arguments of `zerofleet` by what they do."""
    recipes = HERE.parent / "recipes"
    found = {}
    for path in sorted(recipes.rglob("*.yaml")):
        name = path.relative_to(recipes).with_suffix("").as_posix()
        text = path.read_text("utf-8")
        if 'model_name_or_path: "${env:ZEROFLEET_ASSETS:-' in text:
            continue  # of weights that are fetched first: benchmarks/real_weights.py
        continued = text.replace("\\\n#", "")
        second = continued.splitlines()[1].removeprefix("# ")
        found[f"plan {name}"] = shlex.split(second)[1:] if second.startswith("zerofleet plan ") else ["plan", name]
    large = ["--gpu", "H100-80GB", "--nodes"]
    batch = "training.global_batch_size=2048"
    found["plan 405B, 16,384 GPUs"] = ["plan", "parallel/llama3-405b", batch, *large, "2048"]
    found["search 70B, 1,024 GPUs"] = ["plan", "parallel/llama3-70b", f"{batch[:-4]}1024", "--search", *large, "128"]
    open_fields = ["zero.stage=null", "zero.offload_optimizer=none"]
    found["search 70B, 1,024 GPUs, every ZeRO stage"] = [*found["search 70B, 1,024 GPUs"], *open_fields]
    return found


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each command; arms take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in commands()}
    processor: dict[str, list[float]] = {name: [] for name in commands()}
    heavy: dict[str, str] = {}
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    for _ in range(rounds):
        for name, arguments in commands().items():
            script = SCRIPT.format(heavy=HEAVY)
            started, before = time.perf_counter(), os.times()
            done = subprocess.run(
                [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
            )
            seconds[name].append(time.perf_counter() - started)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            processor[name].append(used)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            heavy[name] = done.stderr.splitlines()[-1]
    return {
        name: {"seconds": Spread.of(values), "processor_seconds": Spread.of(processor[name]), "heavy": heavy[name]}
        for name, values in seconds.items()
    }


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": machine(), "commands": result}, indent=1, default=vars))
        return
    for name, facts in result.items():
        times = f"{facts['seconds'].text('.2f')} s, of a processor {facts['processor_seconds'].text('.2f')} s"
        print(f"{name:<44} {times}, imported {facts['heavy']}")


if __name__ == "__main__":
    main()
