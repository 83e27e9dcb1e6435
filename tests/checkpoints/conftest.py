"""Checkpoints as the commit protocol makes them, of bytes that mean nothing: these tests need no torch."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.disk import HashedFile
from launcher.checkpoints.files import record_of
from launcher.checkpoints.manifest import Manifest, RankManifest
from launcher.planning.layout import BatchPlan, Layout
from launcher.recipe.loading import recipe_hash
from launcher.recipe.schema import Recipe

MakeCheckpoint = Callable[..., Path]

RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"sources": [{"type": "text", "files": ["a.txt"]}], "sequence_length": 32},
        "training": {"max_steps": 4, "micro_batch_size": 1},
    }
)


def manifest_of(step: int, **changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "step": step,
        "consumed_samples": 8 * step,
        "layout": Layout(world_size=2, data_parallel_size=2),
        "batch": BatchPlan(micro_batch_size=1, gradient_accumulation_steps=4, global_batch_size=8),
        "zero_stage": 2,
        "precision": "fp32",
        "data_fingerprint": "f" * 32,
        "recipe": RECIPE,
        "recipe_hash": recipe_hash(RECIPE),
        "best_eval_loss": None,
        "evaluations_without_improvement": 0,
        "rng": {"seed": 42},
        "versions": {"zerofleet": "0"},
        "saved_at": 1e9 + step,
        "reason": "interval",
        "files": {},
    }
    return Manifest(**{**facts, **changes})


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Commit a checkpoint of two ranks below `tmp_path / "run" / "checkpoints"`."""
    return lambda step, **facts: checkpoint_in(tmp_path / "run" / "checkpoints", step, **facts)


def checkpoint_in(checkpoints: Path, step: int, size: int = 20_000, **changes: Any) -> Path:
    incomplete = checkpoints / (folders.folder_name(step) + folders.INCOMPLETE)
    incomplete.mkdir(parents=True)
    generator = random.Random(step)
    parts = {}
    for rank in (0, 1):
        records = {}
        for name in ("model.pt",) if rank == 0 else ():
            records |= write(incomplete / name, generator.randbytes(size // 2), rank)
        records |= write(incomplete / f"optim_{rank}.pt", generator.randbytes(size), rank)
        part = RankManifest(rank=rank, token="t", files=records)
        folders.write_rank_manifest(incomplete, part)
        read = folders.read_rank_manifest(incomplete, rank, "t")
        assert read is not None
        parts[rank] = read
    return folders.commit(incomplete, manifest_of(step, **changes), parts)


def write(path: Path, content: bytes, rank: int) -> dict[str, Any]:
    file = HashedFile(path)
    with file:
        file.write(content)
    return {path.name: record_of(file, rank)}
