"""What the ranks that hold one part of the model between them saved, by parameter, whatever ZeRO stage they ran."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.training.averaging import average_file, has_averages, read_averages
from launcher.training.checkpoint_files import read_state

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""The weights, and what Adam keeps of each of them."""
AVERAGE = "ema"
"""The weights' moving average, where the run keeps one."""
DROPPED = (
    "module",
    "optimizer",
    "parameter_names",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "universal_checkpoint_info",
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
    """The states of one model-parallel rank, from all data-parallel ranks; files are mapped, not read.

    Args:
        folder: of the checkpoint.
        manifest: of it.
        model_rank: which part of the model, as DeepSpeed counts them: pipeline stage by stage, tensor rank by rank.

    Attributes:
        shapes: of every trained parameter, by the engine's name; of a tensor-parallel rank, those of its parts.
        optimizer: what the optimizer keeps that is not by parameter: its groups' options, the loss scale.
        model_state: DeepSpeed's record of schedule and counters.
        extras: buffers and frozen parameters, by the engine's name.
        written: all of DeepSpeed's record; its tensors must not be kept.

    Raises:
        CheckpointError: a file cannot be read, or does not hold what DeepSpeed writes.
    """

    def __init__(self, folder: Path, manifest: Manifest, model_rank: int = 0) -> None:
        self.folder = folder
        self._suffix = f"mp_rank_{model_rank:02d}"
        self.shapes: dict[str, torch.Size] = {}
        self._flat: list[list[dict[str, Any]]] = []
        self._fragments: dict[str, list[Fragment]] = {}
        # ZeRO spreads the states of ranks that share sequences too.
        ranks = manifest.layout.data_parallel_size * manifest.layout.sequence_parallel_size
        stage = manifest.zero_stage
        try:
            if stage == 0:
                self._read_replicated()
            else:
                prefix = "bf16_" if manifest.precision == "bf16" else ""
                names = [f"{prefix}zero_pp_rank_{rank}_{self._suffix}_optim_states.pt" for rank in range(ranks)]
                optimizers = [read_state(folder / name, mapped=True)["optimizer_state_dict"] for name in names]
                (self._read_partitioned if stage == 3 else self._read_sharded)(optimizers, ranks)
            if has_averages(manifest):
                self._read_averages()
        except (KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{folder} does not hold what DeepSpeed writes: {error!r}") from error

    def _read_replicated(self) -> None:
        """ZeRO 0: each parameter is a flat state of its own."""
        state = read_state(self.folder / f"{self._suffix}_model_states.pt", mapped=True)
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
        state = read_state(self.folder / f"{self._suffix}_model_states.pt", mapped=True)
        self._keep_shapes(state)
        for shard, optimizer in enumerate(optimizers):
            states = optimizer["base_optimizer_state"]["state"]
            weights = optimizer["single_partition_of_fp32_groups"]
            self._flat.append([{"fp32": flat, **states.get(group, {})} for group, flat in enumerate(weights)])
            for group, mapping in enumerate(optimizer["param_slice_mappings"]):
                for name, address in mapping.items():
                    self._fragments.setdefault(name, []).append(Fragment(shard, group, address.start, address.numel))
        self._keep_common(state, optimizers[0]["base_optimizer_state"]["param_groups"], optimizers[0])
        self.extras = self._not_trained(state)

    def _read_partitioned(self, optimizers: list[Any], ranks: int) -> None:
        """ZeRO 3: every rank has an equal part of each parameter, the last ones padded."""
        names = [f"zero_pp_rank_{rank}_{self._suffix}_model_states.pt" for rank in range(ranks)]
        states = [read_state(self.folder / name, mapped=True) for name in names]
        self._keep_shapes(states[0])
        for shard, optimizer in enumerate(optimizers):
            inner = optimizer["optimizer_state_dict"]["state"]
            weights = optimizer["fp32_flat_groups"]
            self._flat.append([{"fp32": flat, **inner.get(group, {})} for group, flat in enumerate(weights)])
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

    def _read_averages(self) -> None:
        for shard, flats in enumerate(self._flat):
            averages = read_averages(self.folder / average_file(shard), mapped=True)
            for flat, average in zip(flats, averages, strict=True):
                flat[AVERAGE] = average.flatten()

    def _keep_shapes(self, state: Any) -> None:
        for shapes in state["param_shapes"]:
            self.shapes |= shapes

    def _keep_common(self, state: Any, groups: list[Any], optimizer: Any) -> None:
        self.written = state
        kept = {key: value for key, value in state.items() if key not in DROPPED}
        self.model_state = kept | {"module": {}, "mp_world_size": 1}  # the universal form has one file for all ranks
        scale = {key: optimizer[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in optimizer}
        self.optimizer = {**scale, "param_groups": groups, "ds_version": state["ds_version"]}

    def _not_trained(self, state: Any) -> dict[str, torch.Tensor]:
        """Of stages 0 to 2; a pipeline's weights lie in files of their own, and all of them are trained."""
        aliases = state["shared_params"] or {}
        module = state["module"] or {}
        return {name: tensor for name, tensor in module.items() if name not in self.shapes and name not in aliases}

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """A parameter's state, as this model-parallel rank has it; contiguous, fp32.

        Raises:
            CheckpointError: another optimizer than AdamW trained it, or the run keeps no average.
        """
        flats = [(self._flat[fragment.shard][fragment.group], fragment) for fragment in self._fragments[name]]
        if any(key not in flat for flat, _ in flats):
            keeper = "a run with training.ema" if key == AVERAGE else "AdamW"
            raise CheckpointError(f"{self.folder} does not hold {key} of {name}, which {keeper} keeps")
        parts = [flat[key].narrow(0, fragment.start, fragment.numel) for flat, fragment in flats]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        return whole.view(self.shapes[name]).float()

    def step(self, name: str) -> Any:
        """How many updates the optimizer made."""
        first = self._fragments[name][0]
        return self._flat[first.shard][first.group]["step"]
