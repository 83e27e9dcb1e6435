"""What makes a run save besides its steps, in real ranks; what is kept of it; conversion by hand."""

import json
from collections.abc import Callable

import pytest

from launcher.checkpoints import folders, requests
from launcher.checkpoints.manifest import faults_of, manifest_hash, read_manifest
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.recipe.run_sections import CheckpointSection
from launcher.run_directory import RunDirectory
from launcher.training.convert import convert_locally
from launcher.training.save_triggers import SaveTriggers
from tests.support.forked import ForkServer

pytestmark = pytest.mark.distributed

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


def reasons(directory: RunDirectory) -> dict[int, str]:
    manifests = map(read_manifest, folders.complete(directory.checkpoints))
    return {manifest.step: manifest.reason for manifest in manifests}


def test_a_request_is_saved_at_the_next_step_and_answered(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run("max_steps=3", "save_total_limit=null")
    request = requests.ask(directory)
    fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert reasons(directory) == {1: "request", 3: "end"}
    assert json.loads(directory.save_answer.read_text()) == {"request": request, "step": 1, "saved": True}
    assert not directory.save_request.exists()


def test_the_clock(fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, _ = make_run("max_steps=3", "save_total_limit=null", "save_minutes=1e-6")
    fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert reasons(directory) == {1: "interval", 2: "interval", 3: "end"}


def test_the_clock_counts_from_the_last_save_of_any_reason(make_run: MakeRun) -> None:
    directory, _ = make_run()
    now = 100.0
    triggers = SaveTriggers(directory, CheckpointSection(save_minutes=2), clock=lambda: now)
    now += 119
    assert not triggers.due()
    now += 1
    assert triggers.due()
    triggers.begun()
    assert not triggers.due()


def test_the_best_by_validation_loss_are_kept(
    fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    """The learning rate is so high that the loss soon rises: the best is an early one."""
    directory, _ = make_run(
        "max_steps=6", "save_steps=1", "eval_steps=1", "save_total_limit=1", "keep_best=1", "learning_rate=1",
        "warmup_steps=3", "max_grad_norm=1000",
    )  # fmt: skip
    fork_server.results(2, "cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert best < 6
    assert sorted(reasons(directory)) == [best, 6]


@pytest.mark.parametrize("stage", [0, 3])
def test_conversion_by_hand_is_what_a_resume_makes_and_uses(
    stage: int, fork_server: ForkServer, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run("max_steps=2", f"zero.stage={stage}")
    arguments = {"run_directory": str(directory.path), "data": str(prepared.directory)}
    fork_server.results(2, "cases:run", **arguments)
    (folder,) = folders.complete(directory.checkpoints)
    converted = convert_locally(folder, workers=2)
    assert converted.folder == folders.universal_of(folder)
    assert faults_of(converted.folder, contents=True) == []
    manifest = read_manifest(converted.folder)
    assert (manifest.kind, manifest.source, manifest.size) == ("universal", manifest_hash(folder), converted.size)
    assert {record.rank for record in manifest.files.values()} == {0, 1}, "both processes wrote a part"
    again = convert_locally(folder, workers=2)
    assert (again.folder, again.seconds) == (converted.folder, 0.0)
    make_run("max_steps=3", "zero.stage=2", workers=1, name="run")
    (result,) = fork_server.results(1, "cases:run", **arguments)
    assert (result["step"], result["notices"]) == (3, []), "the cached form is used: nothing is converted"
