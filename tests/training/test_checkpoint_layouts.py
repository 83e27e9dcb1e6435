"""Saved in one layout and resumed in another: the losses and samples of the run that nobody interrupted."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import folders
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from tests.support.forked import ForkServer

pytestmark = [pytest.mark.distributed, pytest.mark.matrix]

SETTINGS = (
    "max_steps=15",
    "micro_batch_size=1",
    "gradient_accumulation_steps=null",
    "global_batch_size=12",
    "eval_steps=1000",
    "save_total_limit=null",
)
SAVED_AT = 5
TOLERANCE = 2e-6


def losses(directory: RunDirectory) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_json_lines(directory.metrics) if "loss" in r}


def samples(directory: RunDirectory) -> Counter[tuple[int, ...]]:
    """How often each sample was trained on; of a step that was made twice the last time."""
    by_step: dict[tuple[str, int], list[Any]] = {}
    for path in directory.logs.glob("samples_*.jsonl"):
        for record in read_json_lines(path):
            by_step[path.name, record["step"]] = record["sample_ids"]
    return Counter(tuple(sample) for ids in by_step.values() for sample in ids)


class Runs:
    """Starts runs of the tiny recipe in any layout, and keeps the checkpoints of those that are asked for twice."""

    def __init__(self, folder: Path, fork_server: ForkServer, recipe: Path, data: Path) -> None:
        self.folder, self.fork_server, self.recipe, self.data = folder, fork_server, recipe, data
        self._saved: dict[tuple[Any, ...], RunDirectory] = {}

    def plan(self, directory: RunDirectory, workers: int, stage: int, *overrides: str) -> None:
        recipe = load_recipe(self.recipe, [*SETTINGS, f"zero.stage={stage}", *overrides])
        write_run(directory, make_plan(recipe, Resources(workers_per_node=workers)))

    def train(
        self, directory: RunDirectory, workers: int, stage: int, *overrides: str, until: int | None = None
    ) -> Any:
        self.plan(directory, workers, stage, *overrides)
        return self.fork_server.results(
            workers, "cases:run", run_directory=str(directory.path), data=str(self.data), stop_after=until
        )

    def saved(self, workers: int, stage: int, *overrides: str) -> RunDirectory:
        """A run that was stopped after some steps; to be copied."""
        key = (workers, stage, *overrides)
        if key not in self._saved:
            directory = RunDirectory.at(self.folder / f"saved-{len(self._saved)}")
            self.train(directory, workers, stage, *overrides, until=SAVED_AT - 1)
            assert folders.step_of(folders.complete(directory.checkpoints)[-1]) == SAVED_AT
            self._saved[key] = directory
        return self._saved[key]

    def copy(self, saved: RunDirectory, folder: Path) -> RunDirectory:
        shutil.copytree(saved.path, folder)
        return RunDirectory.at(folder)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer, base_recipe: Path, prepared: PreparedData
) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"), fork_server, base_recipe, prepared.directory)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> RunDirectory:
    """The uninterrupted run."""
    directory = RunDirectory.at(runs.folder / "whole")
    runs.train(directory, 2, 2)
    return directory


def check_same(directory: RunDirectory, whole: RunDirectory, tolerance: float = TOLERANCE) -> None:
    found, expected = losses(directory), losses(whole)
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst <= tolerance, f"{worst} at some step: {found} {expected}"
    assert samples(directory) == samples(whole)


TENSOR = "tensor_parallel_size=2"
PIPELINE = "pipeline_parallel_size=2"
SEQUENCE = "sequence_parallel_size=2"
Layout = tuple[Any, ...]
"""Workers, ZeRO stage and overrides."""


def named(layout: Layout) -> str:
    workers, stage, *overrides = layout
    return "-".join([f"{workers}w-zero{stage}", *(override.partition("_")[0] for override in overrides)])


CASES = [
    *[((2, old), (2, new)) for old in (0, 1, 2, 3) for new in (0, 1, 2, 3) if old != new],
    *[((4, stage), (2, stage)) for stage in (1, 2, 3)],
    *[((1, stage), (3, stage)) for stage in (0, 1, 2, 3)],
    ((3, 3), (1, 1)),
    ((1, 2), (4, 3)),
]


@pytest.mark.parametrize(("old", "new"), CASES, ids=named)
def test_another_layout_continues_the_same_run(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    directory = runs.copy(runs.saved(*old), tmp_path / "run")
    results = runs.train(directory, *new)
    assert results[0]["status"] == "complete"
    check_same(directory, whole)
    needed = not ({old[1], new[1]} == {0} or (old[0] == new[0] and {old[1], new[1]} <= {1, 2}))
    assert [notice.split()[0] for notice in results[0]["notices"]] == ["converting", "converted"] * needed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 1), (1, 3)),
        ((2, 3), (1, 2)),
        ((1, 3), (2, 1, PIPELINE)),
        ((2, 1, PIPELINE), (2, 3, TENSOR)),
    ],
    ids=named,
)
def test_16_bit_weights_continue_from_their_fp32_copies(old: Layout, new: Layout, runs: Runs, tmp_path: Path) -> None:
    """Of the uninterrupted run in bf16 at the new size the losses differ by what rounding differs there anyway."""
    precision = "precision=bf16"
    uninterrupted = RunDirectory.at(tmp_path / "whole")
    runs.train(uninterrupted, *new, precision)
    directory = runs.copy(runs.saved(*old, precision), tmp_path / "run")
    runs.train(directory, *new, precision)
    check_same(directory, uninterrupted, tolerance=5e-3)


def check_continues(runs: Runs, old: Layout, new: Layout, whole: RunDirectory, folder: Path) -> None:
    directory = runs.copy(runs.saved(*old), folder)
    results = runs.train(directory, *new)
    assert results[0]["status"] == "complete"
    assert [notice.split()[0] for notice in results[0]["notices"]] == ["converting", "converted"]
    check_same(directory, whole)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, 1), (2, 1, TENSOR)),
        ((4, 2), (2, 3, TENSOR)),
        ((2, 3), (4, 2, TENSOR)),
        ((2, 1), (2, 2, TENSOR)),
    ],
    ids=named,
)
def test_tensor_parallel_ranks_take_their_parts_of_whole_weights(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 1, TENSOR), (1, 1)),
        ((2, 3, TENSOR), (3, 2)),
        ((4, 2, TENSOR), (2, 3)),
        ((2, 0, TENSOR), (2, 1)),
    ],
    ids=named,
)
def test_parts_of_tensor_parallel_ranks_are_joined(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, 1), (2, 1, PIPELINE)),
        ((2, 3), (4, 1, PIPELINE)),
        ((2, 2), (4, 1, PIPELINE, TENSOR)),
        ((4, 2, TENSOR), (2, 1, PIPELINE)),
    ],
    ids=named,
)
def test_stages_of_a_pipeline_find_their_layers(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 1, PIPELINE), (2, 1)),
        ((4, 1, PIPELINE), (1, 3)),
        ((4, 1, PIPELINE, TENSOR), (3, 2)),
    ],
    ids=named,
)
def test_stages_of_a_pipeline_are_joined(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 1, SEQUENCE), (1, 2)),
        ((2, 3), (4, 1, SEQUENCE)),
        ((4, 3, SEQUENCE), (2, 2, SEQUENCE)),
        ((2, 0, SEQUENCE), (2, 1)),
    ],
    ids=named,
)
def test_ranks_that_share_sequences_hold_the_same_weights(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 1, PIPELINE, TENSOR), (4, 1, PIPELINE)),
        ((2, 1, PIPELINE), (2, 1, TENSOR)),
        ((2, 3, TENSOR), (4, 1, TENSOR)),
        ((2, 2, SEQUENCE), (2, 1, PIPELINE)),
    ],
    ids=named,
)
def test_one_kind_of_parallelism_follows_another(
    old: Layout, new: Layout, runs: Runs, whole: RunDirectory, tmp_path: Path
) -> None:
    check_continues(runs, old, new, whole, tmp_path / "run")


TIED = ("model.config.tie_word_embeddings=true",)
BIASED = ("model.config.attention_bias=true", "model.config.mlp_bias=true")


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        (TIED, (2, 1, PIPELINE), (2, 1, TENSOR)),
        (TIED, (2, 1, TENSOR), (2, 1, PIPELINE)),
        (TIED, (1, 3), (4, 1, PIPELINE, TENSOR)),
        (BIASED, (4, 1, PIPELINE, TENSOR), (2, 1, TENSOR)),
    ],
    ids=lambda value: {TIED: "tied", BIASED: "biases"}.get(value) or named(value),
)
def test_tied_weights_and_biases(
    changes: tuple[str, ...], old: Layout, new: Layout, runs: Runs, tmp_path: Path
) -> None:
    """Two stages hold a tied weight, and each tensor-parallel rank the whole of a bias that is added after the sum."""
    uninterrupted = RunDirectory.at(tmp_path / "whole")
    runs.train(uninterrupted, 1, 1, *changes)
    check_continues(runs, (*old, *changes), (*new, *changes), uninterrupted, tmp_path / "run")


def test_a_chain_of_sizes(runs: Runs, whole: RunDirectory, tmp_path: Path) -> None:
    """4 workers, then 2, 1, 3 and 4 again, each time from what the one before saved."""
    directory = RunDirectory.at(tmp_path / "run")
    for workers, stage, until in [(4, 1, 2), (2, 3, 5), (1, 2, 8), (3, 3, 11), (4, 2, None)]:
        (result, *_) = runs.train(directory, workers, stage, until=until)
        assert result["status"] == ("stopped" if until else "complete")
    check_same(directory, whole)


@pytest.mark.parametrize(("on_change", "first"), [("continue", 12 * SAVED_AT), ("restart", 0)])
def test_other_data_is_continued_or_begun(
    on_change: str, first: int, runs: Runs, prepared: PreparedData, tmp_path: Path
) -> None:
    """The same recipe with packing off is other data; where it is taken up is seen from what was trained on."""
    from launcher.data.prepare import prepare

    changes = ("data.packing=none", f"data.on_change={on_change}")
    other = prepare(load_recipe(runs.recipe, [*SETTINGS, *changes]), progress=False)
    assert other.fingerprint != prepared.fingerprint
    directory = runs.copy(runs.saved(1, 2), tmp_path / "run")
    data = Runs(runs.folder, runs.fork_server, runs.recipe, other.directory)
    (result,) = data.train(directory, 1, 2, *changes, "max_steps=7")
    assert result["consumed_samples"] == first + 2 * 12
    alone = RunDirectory.at(tmp_path / "alone")
    data.train(alone, 1, 2, *changes, "max_steps=7")
    trained = [record["sample_ids"] for record in read_json_lines(directory.logs / "samples_00000.jsonl")[-2:]]
    expected = [record["sample_ids"] for record in read_json_lines(alone.logs / "samples_00000.jsonl")]
    begin = first // 12
    assert trained == expected[begin : begin + 2]
