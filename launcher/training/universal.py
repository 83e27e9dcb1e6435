"""From a checkpoint in one layout to DeepSpeed's universal form, which every layout can load.

The form is that of `deepspeed/checkpoint/ds_to_universal.py`: a folder a parameter with its fp32 weights and its
optimizer states, whole. DeepSpeed's own converter writes it differently for ZeRO 1 and 2 than for 3, so that neither
side loads the other's; it knows no ZeRO 0; it runs on one node, through a temporary copy of everything. Here every
process that is given a share reads the shards through the memory map, so each byte is read and written once, and one
form serves all stages.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.training.checkpoint_files import read_state, write_state

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""The weights, and what Adam keeps of each of them."""
EXTRAS = "zero/extras.pt"
"""What ZeRO does not own: buffers and frozen parameters, by name. DeepSpeed's form has no place for them."""
DROPPED = (
    "module",
    "optimizer",
    "parameter_names",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
)
"""Parts of DeepSpeed's model states that stand elsewhere in the universal form, or belong to one layout only."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements in a rank's flat states.

    Attributes:
        shard: index of the data-parallel rank.
        group: index of the flat tensor there.
        start: first element in it.
        numel: elements.
    """

    shard: int
    group: int
    start: int
    numel: int


class Shards:
    """A checkpoint's states by parameter, whatever ZeRO stage saved them; files are mapped, not read.

    Args:
        folder: of the checkpoint.
        manifest: of it; without tensor and pipeline parallelism.

    Attributes:
        shapes: of every trained parameter, by name.
        optimizer: what the optimizer keeps that is not by parameter: its groups' options, the loss scale.
        model_state: DeepSpeed's record of schedule and counters.
        extras: buffers and frozen parameters.

    Raises:
        CheckpointError: a file cannot be read, or does not hold what DeepSpeed writes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._flat: list[list[dict[str, Any]]] = []
        self._fragments: dict[str, list[Fragment]] = {}
        ranks = manifest.layout.data_parallel_size
        stage = manifest.zero_stage
        try:
            if stage == 0:
                self._read_replicated()
            else:
                prefix = "bf16_" if manifest.precision == "bf16" else ""
                names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
                optimizers = [read_state(folder / name, mapped=True)["optimizer_state_dict"] for name in names]
                (self._read_partitioned if stage == 3 else self._read_sharded)(optimizers, ranks)
        except (KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{folder} does not hold what DeepSpeed writes: {error!r}") from error

    def _read_replicated(self) -> None:
        """ZeRO 0: each parameter is a flat state of its own."""
        state = read_state(self.folder / "mp_rank_00_model_states.pt", mapped=True)
        module, optimizer = state["module"], state["optimizer"]
        names = [name for group in state["parameter_names"] for name in group]
        self._flat = [[]]
        for index, name in enumerate(names):
            self.shapes[name] = module[name].shape
            self._flat[0].append({"fp32": module[name].flatten(), **optimizer["state"][index]})
            self._fragments[name] = [Fragment(0, index, 0, module[name].numel())]
        for flat in self._flat[0]:
            flat.update({key: flat[key].flatten() for key in STATES})
        self._keep_common(state, optimizer["param_groups"], {})
        self.extras = self._not_trained(state)

    def _read_sharded(self, optimizers: list[Any], ranks: int) -> None:
        """ZeRO 1 and 2: every rank has a stretch of each parameter group, and says which parameters lie in it."""
        state = read_state(self.folder / "mp_rank_00_model_states.pt", mapped=True)
        self._keep_shapes(state)
        for shard, optimizer in enumerate(optimizers):
            states = optimizer["base_optimizer_state"]["state"]
            weights = optimizer["single_partition_of_fp32_groups"]
            self._flat.append([{"fp32": flat, **states[group]} for group, flat in enumerate(weights)])
            for group, mapping in enumerate(optimizer["param_slice_mappings"]):
                for name, address in mapping.items():
                    self._fragments.setdefault(name, []).append(Fragment(shard, group, address.start, address.numel))
        self._keep_common(state, optimizers[0]["base_optimizer_state"]["param_groups"], optimizers[0])
        self.extras = self._not_trained(state)

    def _read_partitioned(self, optimizers: list[Any], ranks: int) -> None:
        """ZeRO 3: every rank has an equal part of each parameter, the last ones padded."""
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
        states = [read_state(self.folder / name, mapped=True) for name in names]
        self._keep_shapes(states[0])
        for shard, optimizer in enumerate(optimizers):
            inner = optimizer["optimizer_state_dict"]["state"]
            weights = optimizer["fp32_flat_groups"]
            self._flat.append([{"fp32": flat, **inner[group]} for group, flat in enumerate(weights)])
            for group, shapes in enumerate(states[0]["param_shapes"]):
                start = 0
                for name, shape in shapes.items():
                    part = -(-shape.numel() // ranks)
                    numel = max(0, min(part, shape.numel() - shard * part))
                    self._fragments.setdefault(name, []).append(Fragment(shard, group, start, numel))
                    start += part
        self._keep_common(states[0], optimizers[0]["optimizer_state_dict"]["param_groups"], optimizers[0])
        self.extras = {name: states[0]["module"][name] for name in states[0]["buffer_names"]}
        for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
            parts = [state["frozen_param_fragments"][name].flatten() for state in states]
            self.extras[name] = torch.cat(parts)[: shape.numel()].view(shape)

    def _keep_shapes(self, state: Any) -> None:
        for shapes in state["param_shapes"]:
            self.shapes |= shapes

    def _keep_common(self, state: Any, groups: list[Any], optimizer: Any) -> None:
        self.model_state = {key: value for key, value in state.items() if key not in DROPPED} | {"module": {}}
        scale = {key: optimizer[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in optimizer}
        self.optimizer = {**scale, "param_groups": groups, "ds_version": state["ds_version"]}

    def _not_trained(self, state: Any) -> dict[str, torch.Tensor]:
        aliases = state["shared_params"] or {}
        return {
            name: tensor for name, tensor in state["module"].items() if name not in self.shapes and name not in aliases
        }

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """A parameter's whole state, contiguous, fp32."""
        parts = [
            self._flat[fragment.shard][fragment.group][key].narrow(0, fragment.start, fragment.numel)
            for fragment in self._fragments[name]
        ]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        return whole.view(self.shapes[name]).float()

    def step(self, name: str) -> Any:
        """How many updates the optimizer made."""
        first = self._fragments[name][0]
        return self._flat[first.shard][first.group]["step"]


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
    shards = Shards(folder, manifest)
    records: dict[str, FileRecord] = {}
    if rank == 0:
        records |= _write_common(shards, target)

    def write_parameter(name: str) -> dict[str, FileRecord]:
        place = target / "zero" / name
        place.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Any] = {key: {"param": shards.tensor(name, key), "cat_dim": 0} for key in STATES}
        contents["step"] = shards.step(name)
        written = {
            f"zero/{name}/{key}.pt": write_state(content, place / f"{key}.pt", rank)
            for key, content in contents.items()
        }
        progress(sum(record.size for record in written.values()))
        return written

    with ThreadPoolExecutor(threads) as pool:
        for written in pool.map(write_parameter, _share(shards.shapes, rank, count)):
            records |= written
    return records


def _share(shapes: dict[str, torch.Size], rank: int, count: int) -> Iterable[str]:
    """Every `count`-th parameter in the order of size, so that the shares are about equal."""
    return sorted(shapes, key=lambda name: (-shapes[name].numel(), name))[rank::count]


def _write_common(shards: Shards, target: Path) -> dict[str, FileRecord]:
    """What is not by parameter, under every name by which one stage or another asks for it."""
    first = next(iter(shards.shapes))
    groups = shards.optimizer["param_groups"]
    inner = {"state": {0: {"step": shards.step(first)}}, "param_groups": groups}
    contents: dict[str, Any] = {
        "zero/optimizer_state.pt": {**shards.optimizer, "optimizer_state_dict": inner},
        EXTRAS: shards.extras,
        "mp_rank_00_model_states.pt": shards.model_state,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": shards.model_state,
    }
    (target / "zero").mkdir(exist_ok=True)
    return {name: write_state(content, target / name, 0) for name, content in contents.items()}
