"""From the start of a process to the first optimizer step: our cold and warm start against the launchers people use.

Every arm trains the same small model on the same data with the same DeepSpeed config, two gloo ranks: ours with
`zerofleet run`, the others with bare_train.py, which has less to do (no data order, no TensorBoard, no checkpoint). The
end is the time that rank 0 writes after its first step. Arms take turns; ratios are taken within a round.

    zerofleet cold   no Ray runs: the command starts one of its own
    zerofleet warm   RAY_ADDRESS names a Ray head that was started once, before the first round
    torchrun         --standalone
    deepspeed        DeepSpeed's own launcher
    ray train        TorchTrainer, which starts a Ray of its own

    python benchmarks/start_time.py [--rounds 7] [--json]
"""

import sys
from dataclasses import asdict
from typing import Any

import common
from common import BIN, HERE, WORKERS, Bench, Setting, Spread

ARMS = ("zerofleet cold", "zerofleet warm", "torchrun", "deepspeed", "ray train")
RATIOS = (
    ("zerofleet cold", "ray train"),
    ("zerofleet warm", "torchrun"),
    ("zerofleet cold", "torchrun"),
    ("deepspeed", "torchrun"),
    ("ray train", "torchrun"),
)


def seconds_to_first_step(bench: Bench, arm: str, number: int, ray_address: str) -> float:
    """Run one arm once."""
    name = f"{arm.replace(' ', '_')}_{number}"
    environment = bench.environment
    if arm.startswith("zerofleet"):
        command, records = bench.our_command(name)
        if arm == "zerofleet warm":
            environment = environment | {"RAY_ADDRESS": ray_address}
    else:
        job, records = bench.job_file(name)
        command = peer_command(arm, str(job))
    started = common.run_arm(name, command, environment, bench.folder / f"{name}.log")
    first = common.read_records(records)[0]
    if first["step"] != 1:
        raise RuntimeError(f"{name}: the first record is of step {first['step']}")
    return float(first["time"]) - started


def peer_command(arm: str, job: str) -> list[str]:
    """How a person starts the bare loop with another launcher."""
    script = str(HERE / "bare_train.py")
    if arm == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={WORKERS}", script, job]
    if arm == "deepspeed":
        address = ["--master_addr", "127.0.0.1", "--master_port", str(common.free_port())]
        return [str(BIN / "deepspeed"), "--num_gpus", str(WORKERS), *address, script, job]
    return [sys.executable, str(HERE / "ray_train.py"), job]


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Run one round that does not count (it fills the page cache), then all others; returns the figures."""
    result: dict[str, Any] = {"machine": common.machine(), "setting": asdict(setting), "rounds": []}
    with common.bench(setting, initial_weights=False) as bench, common.ray_head(bench) as ray_address:
        for number in range(rounds + 1):
            figures = {
                arm: seconds_to_first_step(bench, arm, number, ray_address) for arm in common.rotated(ARMS, number)
            }
            print(f"round {number}/{rounds}: {figures}", file=sys.stderr)
            if number:
                result["rounds"].append(figures)
    return result | summarise(result["rounds"])


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds, and of the rounds' own ratios."""
    return {
        "seconds": {arm: asdict(Spread.of([figures[arm] for figures in rounds])) for arm in ARMS},
        "ratios": {
            f"{over} / {under}": asdict(Spread.of([figures[over] / figures[under] for figures in rounds]))
            for over, under in RATIOS
        },
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what `measure` returned."""
    print(f"{len(result['rounds'])} rounds by turns, {WORKERS} gloo ranks, median (smallest - largest)")
    print("process start to first optimizer step, seconds")
    for arm, spread in result["seconds"].items():
        print(f"  {arm:<32}{Spread(**spread).text('.2f')}")
    print("ratio within a round")
    for pair, spread in result["ratios"].items():
        print(f"  {pair:<32}{Spread(**spread).text('.2f')}")
    machine = result["machine"]
    print(f"{machine['cores']} cores, load {machine['load_average']:.1f} before; torch {machine['torch']}, "
          f"deepspeed {machine['deepspeed']}, ray {machine['ray']}")  # fmt: skip


def main() -> int:
    """Parse the command line and run."""
    arguments = common.command_line(__doc__).parse_args()
    setting = Setting(
        steps=3, logging_steps=1, hidden_size=64, num_hidden_layers=2, sequence_length=64, micro_batch_size=2
    )
    return common.show(measure(setting, arguments.rounds), arguments, print_table)


if __name__ == "__main__":
    sys.exit(main())
