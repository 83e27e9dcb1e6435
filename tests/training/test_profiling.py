"""Profiler windows: what the recipe asks for is written, for the steps and ranks that it names."""

import gzip
import json
from collections.abc import Callable

import pytest

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.ranks import Ranks

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


@pytest.mark.distributed
def test_a_window_of_steps_is_recorded_on_the_ranks_that_are_named(
    two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run("max_steps=5", "profiling.start_step=2", "profiling.num_steps=2", "profiling.ranks=[1]")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    (path,) = directory.profile.iterdir()
    assert path.name == "rank_00001_steps_2_3.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "Optimizer.step#AdamW.step" and event.get("ph") == "X"]
    groups = 2  # decayed and others: ZeRO lets the optimizer step once for each
    assert len(steps) == 2 * groups


@pytest.mark.distributed
def test_a_run_that_ends_inside_of_a_window_writes_what_it_has(
    two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run("max_steps=3", "profiling.start_step=3", "profiling.num_steps=4")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert [path.name for path in directory.profile.iterdir()] == ["rank_00000_steps_3_3.json.gz"]


@pytest.mark.distributed
def test_flops_are_counted_layer_by_layer_in_the_log(
    two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, plan = make_run("max_steps=3", "profiling.flops_step=2")
    assert plan.deepspeed_config["flops_profiler"] == {"enabled": True, "profile_step": 2}
    before = two_ranks.logs[0].read_text().count("DeepSpeed Flops Profiler")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    text = two_ranks.logs[0].read_text()
    assert text.count("DeepSpeed Flops Profiler") > before
    assert "LlamaDecoderLayer" in text


@pytest.mark.distributed
def test_nothing_is_recorded_unless_asked_for(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, plan = make_run("max_steps=2")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert not directory.profile.exists()
    assert "flops_profiler" not in plan.deepspeed_config
