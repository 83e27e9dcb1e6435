"""What the benchmarks share: a recipe with its data and batches made ready beforehand, arms run one by one, medians."""

import argparse
import ctypes
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
WORKERS = 2
ARM_TIMEOUT_S = 600.0
HEAD_TIMEOUT_S = 60.0
GRACE_S = 5.0

RECIPE = """\
name: benchmark
model:
  config:
    model_type: llama
    hidden_size: {hidden_size}
    intermediate_size: {intermediate_size}
    num_hidden_layers: {num_hidden_layers}
    num_attention_heads: {num_attention_heads}
    max_position_embeddings: {sequence_length}
    tie_word_embeddings: true
tokenizer:
  train: {{vocab_size: {vocab_size}}}
data:
  sources:
    - type: text
      files: ["${{sysconfig:stdlib}}/*.py"]
  sequence_length: {sequence_length}
training:
  max_steps: {steps}
  micro_batch_size: {micro_batch_size}
  gradient_accumulation_steps: {gradient_accumulation_steps}
  precision: fp32
  learning_rate: 1.0e-3
  lr_scheduler_type: constant_with_warmup
  warmup_steps: {warmup_steps}
zero: {{stage: {zero_stage}}}
logging: {{logging_steps: {logging_steps}}}
export: {{at_end: false}}
"""


@dataclass(frozen=True)
class Setting:
    """The training that every arm does."""

    steps: int
    logging_steps: int
    hidden_size: int
    num_hidden_layers: int
    sequence_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int = 1
    vocab_size: int = 2048
    warmup_steps: int = 10
    zero_stage: int = 2

    @property
    def recipe(self) -> str:
        """As a recipe."""
        heads = max(1, self.hidden_size // 64)
        return RECIPE.format(**asdict(self), intermediate_size=4 * self.hidden_size, num_attention_heads=heads)


@dataclass(frozen=True)
class Bench:
    """A setting made ready on disk.

    Attributes:
        folder: holds everything; gone afterwards.
        recipe: for our arms; its data is prepared.
        job: for the bare arms: model, DeepSpeed config and scheduler of the same recipe, and our loader's batches.
        environment: of every arm.
    """

    folder: Path
    recipe: Path
    job: dict[str, Any]
    environment: dict[str, str]

    def job_file(self, name: str) -> tuple[Path, Path]:
        """Write the job of one bare arm; returns the job file and where its records will be."""
        records = self.folder / f"{name}.records.jsonl"
        path = self.folder / f"{name}.job.json"
        path.write_text(json.dumps({**self.job, "records": str(records)}))
        return path, records

    def our_command(self, name: str) -> tuple[list[str], Path]:
        """The command of one of our arms, and where its records will be."""
        run = self.folder / name
        return [str(BIN / "zerofleet"), "run", str(self.recipe), "--run-dir", str(run), "--json"], run / "metrics.jsonl"


@contextmanager
def bench(setting: Setting, *, initial_weights: bool) -> Iterator[Bench]:
    """Prepare the data, and what the bare arms need, so that no arm pays for it.

    Args:
        setting: the training.
        initial_weights: start the bare arms from our initial weights, so that losses can be compared.
    """
    with tempfile.TemporaryDirectory(prefix="zfb-") as temporary, no_process_left():
        folder = Path(temporary)
        environment = arm_environment(folder)
        recipe = folder / "recipe.yaml"
        recipe.write_text(setting.recipe)
        prepared = json.loads(_zerofleet(environment, "prepare", str(recipe), "--json"))
        plan_json = _zerofleet(environment, "plan", str(recipe), "--json")
        job = _bare_job(setting, plan_json, Path(prepared["directory"]), folder, initial_weights)
        yield Bench(folder, recipe, job, environment)


def arm_environment(folder: Path) -> dict[str, str]:
    """What every arm gets: our workers' own defaults, so that peers have them too, and caches of the benchmark's own.

    TORCHDYNAMO_DISABLE spares a rank 2 s at `deepspeed.initialize`. Our workers set it themselves on CPU, the peers'
    users would have to know of it; they get it here, so that launchers are compared and not this.
    """
    left_out = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE", "CI")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # without one, Ray writes one into the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
        "TMPDIR": str(folder),  # what launchers leave behind goes with it
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "ZEROFLEET_CACHE": str(folder / "cache"),
    }


def _zerofleet(environment: dict[str, str], *arguments: str) -> str:
    command = [str(BIN / "zerofleet"), *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def _bare_job(setting: Setting, plan_json: str, prepared: Path, folder: Path, initial_weights: bool) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from launcher.data.loader import BatchLoader
    from launcher.data.sampler import GlobalOrder
    from launcher.data.store import PreparedData
    from launcher.models.build import build_config, build_model
    from launcher.planning.plan import Plan
    from launcher.tasks import make_task

    plan = Plan.model_validate_json(plan_json)
    data = PreparedData.load(prepared)
    datasets = data.split("train")
    order = GlobalOrder([len(dataset) for dataset in datasets], [1.0], seed=plan.recipe.seed, shuffle=True)
    collate = make_task(plan, data.facts).collate
    by_rank = []
    for rank in range(WORKERS):
        with BatchLoader(datasets, order, plan.batch, rank, WORKERS, collate) as loader:
            by_rank.append([_as_array(next(loader).micro_batches) for _ in range(setting.steps)])
    batches = np.stack(by_rank, axis=2)  # [steps, accumulation, ranks, 3, samples, tokens]
    np.save(folder / "batches.npy", batches)
    weights = None
    if initial_weights:
        weights = str(folder / "weights.pt")
        torch.save(build_model(plan.model_copy(update={"zero_stage": 0}), AutoModelForCausalLM).state_dict(), weights)
    return {
        "model": build_config(plan).to_dict(),
        "deepspeed": plan.deepspeed_config,
        "scheduler": {
            "type": plan.recipe.training.lr_scheduler_type,
            "warmup_steps": setting.warmup_steps,
            "steps": setting.steps,
        },
        "batches": str(folder / "batches.npy"),
        "weights": weights,
        "steps": setting.steps,
        "logging_steps": setting.logging_steps,
        "workers": WORKERS,
    }


def _as_array(micro_batches: Sequence[dict[str, Any]]) -> Any:
    import numpy as np

    names = ("input_ids", "labels", "position_ids")
    return np.stack([np.stack([batch[name].numpy().astype(np.int32) for name in names]) for batch in micro_batches])


def run_arm(name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> float:
    """Run one arm to its end; returns the Unix time just before its process was started.

    Raises:
        RuntimeError: it failed or took too long; the text ends with the end of its log.
    """
    others = set(psutil.Process().children())
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(ARM_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            for child in set(psutil.Process().children()) - others:  # its process, and the orphans it left
                end_processes([child, *child.children(recursive=True)])
    if code != 0:
        how = "took too long" if code is None else f"ended with {code}"
        raise RuntimeError(f"{name} {how}:\n{log.read_text(errors='replace')[-4000:]}")
    return started


@contextmanager
def no_process_left() -> Iterator[None]:
    """Become the parent of every orphan below this process, and end what is left of them on leaving."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        end_processes(psutil.Process().children(recursive=True))


@contextmanager
def ray_head(bench: Bench) -> Iterator[str]:
    """Start a Ray head as a person would, and wait until it answers; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
    command += [
        f"--node-ip-address={host}",
        f"--port={port}",
        f"--num-cpus={WORKERS}",
        f"--temp-dir={bench.folder}/ray",
    ]
    with (bench.folder / "ray.log").open("wb") as output:
        head = subprocess.Popen(command, env=bench.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        status = [str(BIN / "ray"), "health-check", "--address", address]
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        while subprocess.run(status, env=bench.environment, capture_output=True).returncode != 0:
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray head:\n{(bench.folder / 'ray.log').read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield address
    finally:
        end_processes([psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)])


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """End processes by pid: SIGTERM, and SIGKILL for what is left after a moment."""
    alive = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(alive, timeout=GRACE_S)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an arm that has ended."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """`median (low - high)`."""
        return f"{self.median:{form}} ({self.low:{form}} - {self.high:{form}})"


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken, and how busy the machine was at the beginning."""
    packages = ("torch", "deepspeed", "ray", "transformers")
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def rotated(arms: Sequence[str], by: int) -> list[str]:
    """The arms in an order that gives each one each place in turn."""
    shift = by % len(arms)
    return [*arms[shift:], *arms[:shift]]


def command_line(documentation: str | None) -> argparse.ArgumentParser:
    """What every benchmark takes: the number of rounds, and whether to print JSON."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0] if documentation else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    return parser


def show(result: dict[str, Any], arguments: argparse.Namespace, print_table: Callable[[dict[str, Any]], None]) -> int:
    """Print what was measured, as `--json` or as a table; returns the exit code."""
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)
    return 0
