"""What our loop costs a step: `zerofleet run` against a bare `deepspeed.initialize` loop, two gloo ranks each.

Both train the same model from the same weights on the same batches with the same DeepSpeed config, by turns. The
bare loop reads ready-made batches and has no supervisor; ours reads, shuffles and collates its data, writes
metrics.jsonl and TensorBoard files, answers heartbeats, and has its Ray beside it. Times are between two records that
each arm's rank 0 writes, so that logging counts.

    python benchmarks/step_overhead.py [--rounds 7] [--json]
"""

import argparse
import itertools
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import common
from common import HERE, WORKERS, Bench, Setting, Spread

ARMS = ("zerofleet", "bare")
LOSS_TOLERANCE = 0.001
"""Both arms must learn alike; the bare loop's loss is a mean of means over ranks, ours the mean over all targets."""


def run_round(bench: Bench, arm: str, number: int, warmup_steps: int) -> dict[str, float]:
    """Run one arm once; returns seconds per step (mean, and median of the logging intervals) and the last loss."""
    name = f"{arm}_{number}"
    log = bench.folder / f"{name}.log"
    if arm == "zerofleet":
        command, records_file = bench.our_command(name)
    else:
        job, records_file = bench.job_file(name)
        command = [sys.executable, str(HERE / "step_overhead.py"), "--two-ranks-of", str(job)]
    common.run_arm(name, command, bench.environment, log)
    records = [record for record in common.read_records(records_file) if record["step"] >= warmup_steps]
    first, last = records[0], records[-1]
    intervals = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(records)
    ]
    return {
        "seconds_per_step": (last["time"] - first["time"]) / (last["step"] - first["step"]),
        "median_interval": Spread.of(intervals).median,
        "loss": last["loss"],
    }


def two_ranks(job: str) -> int:
    """Start both ranks of the bare loop with nothing around them, and wait for them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(common.free_port()), "WORLD_SIZE": str(WORKERS)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "bare_train.py"), job],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(WORKERS)},
        )
        for rank in range(WORKERS)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def measure(setting: Setting, rounds: int, warmup_steps: int) -> dict[str, Any]:
    """Run all rounds; returns the figures.

    Raises:
        RuntimeError: an arm failed, or the two did not learn alike.
    """
    result: dict[str, Any] = {"machine": common.machine(), "setting": asdict(setting), "rounds": []}
    with common.bench(setting, initial_weights=True) as bench:
        for number in range(rounds):
            figures = {arm: run_round(bench, arm, number, warmup_steps) for arm in common.rotated(ARMS, number)}
            ours, bare = figures["zerofleet"], figures["bare"]
            if abs(ours["loss"] - bare["loss"]) > LOSS_TOLERANCE * bare["loss"]:
                raise RuntimeError(f"the arms did not learn alike: loss {ours['loss']} and {bare['loss']}")
            result["rounds"].append(figures)
            print(f"round {number + 1}/{rounds}: {figures}", file=sys.stderr)
    return result | summarise(result["rounds"], setting)


def summarise(rounds: list[dict[str, dict[str, float]]], setting: Setting) -> dict[str, Any]:
    """Medians over rounds; the overhead is the median of the rounds' own ratios."""
    tokens = setting.micro_batch_size * setting.gradient_accumulation_steps * WORKERS * setting.sequence_length
    arms = {
        arm: {
            "seconds_per_step": asdict(Spread.of([figures[arm]["seconds_per_step"] for figures in rounds])),
            "tokens_per_second": asdict(Spread.of([tokens / figures[arm]["seconds_per_step"] for figures in rounds])),
        }
        for arm in ARMS
    }

    def overhead(key: str) -> dict[str, float]:
        return asdict(Spread.of([figures["zerofleet"][key] / figures["bare"][key] - 1 for figures in rounds]))

    return {
        "tokens_per_step": tokens,
        "arms": arms,
        "overhead": overhead("seconds_per_step"),
        "overhead_of_median_intervals": overhead("median_interval"),
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what `measure` returned."""
    print(f"{len(result['rounds'])} rounds by turns, {WORKERS} gloo ranks, median (smallest - largest)")
    print(f"{'':<12}{'ms per step':<28}tokens/s")
    for arm, figures in result["arms"].items():
        times = Spread(**{key: value * 1000 for key, value in figures["seconds_per_step"].items()})
        print(f"{arm:<12}{times.text('.2f'):<28}{Spread(**figures['tokens_per_second']).text(',.0f')}")
    print(f"overhead of the whole loop     {Spread(**result['overhead']).text('+.2%')}")
    print(f"overhead of the median interval {Spread(**result['overhead_of_median_intervals']).text('+.2%')}")
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; torch {machine['torch']}, "
          f"deepspeed {machine['deepspeed']}, ray {machine['ray']}")  # fmt: skip


def main() -> int:
    """Parse the command line and run."""
    parser = common.command_line(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="measured steps of each arm and round")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--two-ranks-of", metavar="JOB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.two_ranks_of:
        return two_ranks(arguments.two_ranks_of)
    warmup_steps = 2 * arguments.logging_steps
    setting = Setting(
        steps=warmup_steps + arguments.steps,
        logging_steps=arguments.logging_steps,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        sequence_length=arguments.sequence_length,
        micro_batch_size=arguments.micro_batch_size,
        zero_stage=arguments.zero_stage,
    )
    return common.show(measure(setting, arguments.rounds, warmup_steps), arguments, print_table)


if __name__ == "__main__":
    sys.exit(main())
