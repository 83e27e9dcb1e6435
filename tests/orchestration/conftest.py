"""The real command on a real Ray that is started once: a cold Ray costs seconds, which only one test has to pay."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.local import local_ray
from cluster.ray_node import NodeResources
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support.unmeasured import unmeasured

RECIPE = """
name: tiny
seed: 7
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 64, attention_dropout: 0.1}}
tokenizer: {{train: {{vocab_size: 320}}}}
data:
  sources: [{{type: text, sample_by: paragraph, files: ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}}]
  validation_fraction: 0.1
  sequence_length: 32
  preprocessing_num_workers: 1
  cache_directory: {cache}
training: {{max_steps: 150, micro_batch_size: 2, gradient_accumulation_steps: 2, precision: fp32,
           learning_rate: 3.0e-3}}
evaluation: {{max_eval_samples: 8}}
checkpoint: {{save_steps: 50}}
logging: {{logging_steps: 1, sample_ids: true, tensorboard: false}}
export: {{at_end: false}}
"""


@dataclass
class Zerofleet:
    """Runs the real command line in a process of its own."""

    recipe: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli.main", *arguments],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.recipe.parent,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def train(self, directory: Path, *overrides: str) -> dict[str, Any]:
        """Run to the end and return the summary."""
        code, out, err = self.run("run", str(self.recipe), *overrides, "--run-dir", str(directory), "--json")
        assert code == 0, err
        summary: dict[str, Any] = json.loads(out)
        return summary


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orchestration")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib"), cache=folder / "cache"))
    return path


@pytest.fixture(scope="session")
def warm_ray() -> Iterator[dict[str, str]]:
    """Its workers are not measured; tests/training passes their lines."""
    with ExitStack() as stack:
        with unmeasured():
            ray = stack.enter_context(local_ray(NodeResources(cpus=4)))
        yield ray.environment


@pytest.fixture
def zerofleet(tiny_recipe: Path, warm_ray: dict[str, str]) -> Iterator[Zerofleet]:
    command = Zerofleet(tiny_recipe, warm_ray)
    yield command
    for process in command.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_recipe: Path, warm_ray: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """The run that the interrupted ones are compared with."""
    directory = RunDirectory.at(tmp_path_factory.mktemp("uninterrupted") / "run")
    Zerofleet(tiny_recipe, warm_ray).train(directory.path)
    return directory


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """Poll until the condition gives something true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {timeout} s")


def wait_for_step(directory: RunDirectory, step: int) -> None:
    wait_for(lambda: any(r["step"] >= step for r in read_json_lines(directory.metrics)), f"step {step}")


def worker_pids(directory: RunDirectory) -> dict[int, int]:
    """Process ids of the newest attempt's workers, by rank."""
    running = [event for event in read_json_lines(directory.events) if event["state"] == "running"]
    return {worker["rank"]: worker["pid"] for worker in running[-1]["workers"]}


def records(directory: RunDirectory) -> tuple[dict[int, float], dict[tuple[int, int], Any]]:
    """Loss by step, and sample ids by (rank, step); of a step made twice the last."""
    losses = {r["step"]: r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r}
    samples = {
        (rank, record["step"]): record["sample_ids"]
        for rank in (0, 1)
        for record in read_json_lines(directory.logs / f"samples_{rank:05d}.jsonl")
    }
    return losses, samples


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system that is soon full."""
    if os.geteuid() != 0:
        pytest.skip("hardware: mounting a tmpfs needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


__all__ = ["Zerofleet", "records", "signal", "small_disk", "wait_for", "wait_for_step", "worker_pids"]
