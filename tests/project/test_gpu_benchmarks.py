"""The benchmarks of a GPU: their path runs on a CPU with small models, and without a GPU they refuse to measure one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from tests.support.unmeasured import unmeasured_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "benchmarks" / "gpu").glob("[!h]*.py"))


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **unmeasured_environment(),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_a_gpu_there_is_nothing_to_measure(script: Path) -> None:
    assert len(SCRIPTS) >= 2
    done = run(script)
    assert done.returncode == 2
    assert done.stderr.endswith("with a small model, and its figures mean nothing.\n")
    assert done.stdout == ""


def results(script: str, *arguments: str) -> list[dict[str, Any]]:
    done = run(ROOT / "benchmarks" / "gpu" / script, *arguments, "--tiny", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[\n") :])
    return found


@pytest.mark.distributed
@pytest.mark.timeout(700)
def test_the_path_of_the_throughput_cases_runs() -> None:
    found = results("throughput.py", "pretrain", "lora", "offload", "long", "--steps", "1", "--warm-up", "1")
    assert [result["name"] for result in found] == ["pretrain", "lora", "offload", "long"]
    for result in found:
        assert result["tokens_per_second"] > 0
        assert result["mfu"] is None  # a CPU's peak is not known
        assert result["planned_bytes"] > 0


@pytest.mark.distributed
@pytest.mark.timeout(700)
def test_the_path_of_the_memory_table_runs() -> None:
    found = results("memory.py")
    assert len(found) == 2
    assert all(result["planned_bytes"] > 0 for result in found)


def test_every_case_fits_the_gpu_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    harness, throughput = importlib.import_module("harness"), importlib.import_module("throughput")
    h100 = Resources(workers_per_node=1, device="cuda", accelerator="H100-80GB")
    for case in throughput.CASES.values():
        plan = make_plan(harness.make_case_plan(case, "cpu").recipe, h100)
        assert plan.ranks is not None, case.name


def test_an_unknown_case_is_named() -> None:
    done = run(ROOT / "benchmarks" / "gpu" / "throughput.py", "pretrian")
    assert done.returncode == 2
    assert "no case is named pretrian; there are pretrain, lora, full, offload, long" in done.stderr
