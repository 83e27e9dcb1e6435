"""A run that is stopped and resumed is the uninterrupted run: the same losses, exactly, and the same samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import read_manifest
from launcher.checkpoints.resumable import check_resumable
from launcher.data.store import PreparedData
from launcher.errors import CheckpointError
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support.ranks import Ranks

MakeRun = Callable[..., tuple[RunDirectory, Plan]]
SETTINGS = ("max_steps=12", "save_steps=5", "eval_steps=4")


def losses(directory: RunDirectory) -> dict[int, Any]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_json_lines(directory.metrics) if "loss" in r}


def evaluations(directory: RunDirectory) -> dict[int, float]:
    return {r["step"]: r["eval_loss"] for r in read_json_lines(directory.metrics) if "eval_loss" in r}


def samples(directory: RunDirectory) -> dict[tuple[int, int], Any]:
    return {
        (rank, record["step"]): record["sample_ids"]
        for rank in (0, 1)
        for record in read_json_lines(directory.logs / f"samples_{rank:05d}.jsonl")
    }


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stopped_and_resumed_equals_uninterrupted(
    stage: int, dropout: float, two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    settings = (*SETTINGS, f"zero.stage={stage}", f"model.config.attention_dropout={dropout}")
    whole, _ = make_run(*settings, name="whole")
    two_ranks.call("cases:run", run_directory=str(whole.path), data=str(prepared.directory))
    parts, _ = make_run(*settings, name="parts")
    first, _ = two_ranks.call("cases:run", run_directory=str(parts.path), data=str(prepared.directory), stop_after=6)
    assert first["status"] == "stopped"
    assert 6 < first["step"] < 12
    assert folders.complete(parts.checkpoints)[-1].name == f"step_{first['step']:08d}"
    second, _ = two_ranks.call("cases:run", run_directory=str(parts.path), data=str(prepared.directory))
    assert second["status"] == "complete"
    assert losses(parts) == losses(whole)
    assert evaluations(parts) == evaluations(whole)
    assert samples(parts) == samples(whole)


@pytest.mark.distributed
def test_no_sample_is_seen_twice_in_an_epoch(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, plan = make_run("max_steps=12")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    seen = [tuple(sample) for ids in samples(directory).values() for sample in ids]
    assert len(seen) == 12 * plan.batch.global_batch_size
    assert len(set(seen)) == len(seen)


@pytest.mark.distributed
def test_a_step_without_a_checkpoint_is_made_again(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    """What a crash leaves: metrics beyond the newest checkpoint, and a folder that was being written."""
    directory, _ = make_run(*SETTINGS)
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    before = losses(directory)
    newest = folders.complete(directory.checkpoints)[-1]
    newest.rename(newest.with_name(newest.name + folders.INCOMPLETE))
    resumed_from = folders.complete(directory.checkpoints)[-1].name
    assert resumed_from == "step_00000010"
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert losses(directory) == before
    steps = [record["step"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert steps == sorted(set(steps)), "a step made again must not be recorded twice"


@pytest.mark.distributed
def test_only_the_newest_checkpoints_are_kept(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, _ = make_run("max_steps=8", "save_steps=2", "save_total_limit=3")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert [path.name for path in sorted(directory.checkpoints.iterdir()) if path.is_dir()] == [
        f"step_{step:08d}" for step in (4, 6, 8)
    ]


class TestRefusals:
    """What a driver finds out before it starts a worker."""

    @pytest.fixture(scope="class")
    def saved(
        self, tmp_path_factory: pytest.TempPathFactory, one_rank: Ranks, base_recipe: Path, prepared: PreparedData
    ) -> RunDirectory:
        from launcher.planning.layout import Resources
        from launcher.planning.plan import make_plan
        from launcher.recipe.loading import load_recipe
        from launcher.submit import write_run

        directory = RunDirectory.at(tmp_path_factory.mktemp("saved") / "run")
        write_run(directory, make_plan(load_recipe(base_recipe, ["max_steps=2"]), Resources()))
        one_rank.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        return directory

    def check(self, saved: RunDirectory, plan: Plan, fingerprint: str) -> None:
        folder = folders.complete(saved.checkpoints)[-1]
        check_resumable(read_manifest(folder), plan, fingerprint, folder)

    def test_the_same_plan_is_accepted(self, saved: RunDirectory, make_run: MakeRun, prepared: PreparedData) -> None:
        _, plan = make_run("max_steps=9", "learning_rate=1e-4", workers=1)
        self.check(saved, plan, prepared.fingerprint)

    def test_another_model_and_other_data_are_named(
        self, saved: RunDirectory, make_run: MakeRun, prepared: PreparedData
    ) -> None:
        _, plan = make_run("model.config.hidden_size=64", "data.sequence_length=16", workers=1)
        with pytest.raises(CheckpointError) as error:
            self.check(saved, plan, prepared.fingerprint)
        assert "model.config.hidden_size: 32 in the checkpoint, 64 in the recipe" in str(error.value)
        assert "data.sequence_length: 32 in the checkpoint, 16 in the recipe" in str(error.value)

    def test_changed_files_are_named(self, saved: RunDirectory, make_run: MakeRun) -> None:
        _, plan = make_run(workers=1)
        with pytest.raises(CheckpointError, match="contents are not those of the checkpoint"):
            self.check(saved, plan, "another fingerprint")
