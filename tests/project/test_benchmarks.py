"""The benchmarks run, and what they compare does the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.unmeasured import unmeasured_environment

ROOT = Path(__file__).resolve().parents[2]


def finished(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = unmeasured_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.ray
@pytest.mark.distributed
def test_our_loop_learns_what_the_bare_loop_learns() -> None:
    small = ["--hidden-size", "64", "--layers", "1", "--sequence-length", "32", "--micro-batch-size", "2"]
    command = [sys.executable, "benchmarks/step_overhead.py", "--rounds", "1", "--steps", "4", "--logging-steps", "2"]
    pipe, environment = subprocess.PIPE, unmeasured_environment()
    command += [*small, "--json"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate(timeout=240)
        finally:
            process.terminate()  # it ends what it started
    assert process.returncode == 0, errors
    result = json.loads(output)
    (figures,) = result["rounds"]
    assert figures["zerofleet"]["loss"] == pytest.approx(figures["bare"]["loss"], rel=1e-3)
    for arm in ("zerofleet", "bare"):
        spread = result["arms"][arm]["tokens_per_second"]
        assert spread["median"] == pytest.approx(result["tokens_per_step"] / figures[arm]["seconds_per_step"])


def test_the_cost_of_commands_is_measured_on_a_full_registry() -> None:
    command = [sys.executable, "benchmarks/command_time.py", "--rounds", "1", "--json"]
    done = finished(command)
    result = json.loads(done.stdout)
    assert result["records"] == 1000
    assert set(result["ratios"]) == {f"zerofleet {verb}" for verb in ("--help", "plan", "jobs", "status", "logs")}
    assert all(spread["median"] > 0 for spread in result["ratios"].values())


def test_plans_and_searches_are_timed_and_import_nothing_heavy() -> None:
    command = [sys.executable, "benchmarks/plan_time.py", "--rounds", "1", "--json"]
    done = finished(command)
    found = json.loads(done.stdout)["commands"]
    assert {"plan 405B, 16,384 GPUs", "search 70B, 1,024 GPUs"} <= set(found)
    assert len(found) >= 8
    assert {facts["heavy"] for facts in found.values()} == {"[]"}


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.timeout(700)
def test_a_recovery_is_measured_from_the_kill_to_the_next_step() -> None:
    command = [sys.executable, "benchmarks/recovery.py", "--kills", "1", "--arms", "zerofleet cold", "--json"]
    (arm,) = json.loads(finished(command, timeout=600).stdout)["arms"].values()
    (figure,) = arm["figures"]
    assert 0 < figure["noticed"] < figure["seconds"]
    assert {"recovery: detect", "recovery: import", "recovery: load"} <= set().union(*arm["parts"])


@pytest.mark.distributed
def test_every_way_of_saving_is_measured() -> None:
    command = [sys.executable, "benchmarks/checkpoint.py", "--megabytes", "4", "--rounds", "1", "--json"]
    done = finished(command)
    result = json.loads(done.stdout)
    assert set(result["arms"]) == {"ours_asynchronous", "ours_synchronous", "deepspeed", "dcp", "dcp_asynchronous"}
    assert all(figures["blocked"]["median"] > 0 for figures in result["arms"].values())
    assert [len(load["told"]) for load in result["loads"].values()] == [0, 2, 0], "converted once"


@pytest.mark.distributed
def test_no_rank_holds_a_pretrained_model_whole() -> None:
    """The bound that the benchmark is for, its 300 MiB for a model of 2 GB scaled to this one's size."""
    command = [sys.executable, "benchmarks/load_memory.py", "--megabytes", "256", "--rounds", "1", "--json"]
    (measured,) = json.loads(finished(command).stdout)["rounds"]
    for rank in measured["streamed"]:
        assert rank["equal"]
        assert rank["growth"] < rank["bound"], rank
    assert measured["transformers"][0]["growth"] > measured["transformers"][0]["bound"], "rank 0 has all of it there"
