"""From a checkpoint in one layout to DeepSpeed's universal form, which every layout can load.

The form is that of `deepspeed/checkpoint/ds_to_universal.py`: a folder a parameter with its fp32 weights and its
optimizer states, whole. DeepSpeed's own converter writes it differently for ZeRO 1 and 2 than for 3, so that neither
side loads the other's; it knows no ZeRO 0; it runs on one node, through a temporary copy of everything. Here every
process that is given a share reads the shards through the memory map, so each byte is read and written once, and one
form serves all stages.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest
from launcher.training.averaging import FOLDER, has_averages
from launcher.training.checkpoint_files import write_state
from launcher.training.shards import AVERAGE, STATES
from launcher.training.whole_states import WholeStates

EXTRAS = "zero/extras.pt"
"""What ZeRO does not own: buffers and frozen parameters, by name. DeepSpeed's form has no place for them."""


def convert(
    folder: Path,
    manifest: Manifest,
    target: Path,
    rank: int = 0,
    count: int = 1,
    threads: int = 1,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, FileRecord]:
    """Write one share of a checkpoint's universal form.

    Args:
        folder: of the checkpoint.
        manifest: of it.
        target: the folder to write into; it exists.
        rank: which share this is.
        count: of how many.
        threads: that work at once in this process.
        progress: told the bytes of each parameter that is done, from several threads.

    Returns:
        Record of every file written, by path relative to the target.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        OSError: the disk is full or fails.
    """
    states = WholeStates(folder, manifest)
    records: dict[str, FileRecord] = {}
    if rank == 0:
        records |= _write_common(states, target)

    def write_parameter(name: str) -> dict[str, FileRecord]:
        place = target / "zero" / name
        place.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Any] = {key: {"param": states.tensor(name, key), "cat_dim": 0} for key in STATES}
        contents["step"] = states.step(name)
        written = {
            f"zero/{name}/{key}.pt": write_state(content, place / f"{key}.pt", rank)
            for key, content in contents.items()
        }
        if has_averages(manifest):  # not beside the others: DeepSpeed takes every file there for the optimizer's
            average = {"param": states.tensor(name, AVERAGE)}
            written[f"{FOLDER}/{name}.pt"] = write_state(average, target / FOLDER / f"{name}.pt", rank)
        progress(sum(record.size for record in written.values()))
        return written

    if has_averages(manifest):
        (target / FOLDER).mkdir(exist_ok=True)

    with ThreadPoolExecutor(threads) as pool:
        for written in pool.map(write_parameter, _share(states.shapes, rank, count)):
            records |= written
    return records


def _share(shapes: dict[str, torch.Size], rank: int, count: int) -> Iterable[str]:
    """Every `count`-th parameter in the order of size, so that the shares are about equal."""
    return sorted(shapes, key=lambda name: (-shapes[name].numel(), name))[rank::count]


def _write_common(states: WholeStates, target: Path) -> dict[str, FileRecord]:
    """What is not by parameter, under every name by which one stage or another asks for it."""
    first = next(iter(states.shapes))
    groups = states.first.optimizer["param_groups"]
    inner = {"state": {0: {"step": states.step(first)}}, "param_groups": groups}
    contents: dict[str, Any] = {
        "zero/optimizer_state.pt": {**states.first.optimizer, "optimizer_state_dict": inner},
        EXTRAS: states.extras,
        "mp_rank_00_model_states.pt": states.first.model_state,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": states.first.model_state,
    }
    (target / "zero").mkdir(exist_ok=True)
    return {name: write_state(content, target / name, 0) for name, content in contents.items()}
