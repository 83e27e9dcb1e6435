"""This rank's part of the trained weights in fp32, whatever the ZeRO stage: to read, to change, and to put to use."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements in a rank's flat weights.

    Attributes:
        name: of the parameter.
        flat: index of the flat tensor.
        start: first element in it.
        offset: first element in the whole parameter.
        numel: elements.
    """

    name: str
    flat: int
    start: int
    offset: int
    numel: int


class Fp32Weights:
    """The weights that the optimizer changes, as DeepSpeed 0.19.8 keeps them, for data-parallel engines.

    ZeRO 0 in fp32 trains the parameters themselves; stages 1 and 2 an fp32 copy of this rank's stretch of each
    parameter group (`runtime/zero/stage_1_and_2.py: single_partition_of_fp32_groups`); stage 3 one of this rank's part
    of each parameter, a subgroup at a time (`runtime/zero/stage3.py: fp32_partitioned_groups_flat`).

    Args:
        engine: of the run.
        zero_stage: of it; stage 0 in fp32 only.

    Attributes:
        flats: the weights, on the device that the optimizer works on. Change them in place, then `put_to_use`.
    """

    def __init__(self, engine: Any, zero_stage: int) -> None:
        self._engine, self._stage = engine, zero_stage
        self._optimizer = engine.optimizer
        self.flats: list[Tensor]
        if zero_stage == 0:
            self.flats = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        elif zero_stage == 3:
            self.flats = list(self._optimizer.fp32_partitioned_groups_flat)
        else:
            self.flats = list(self._optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def put_to_use(self) -> None:
        """Let forward and backward use the weights as they are now, as after an optimizer step; collective."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._optimizer._partition_all_parameters()
            for index in range(len(self.flats)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def learning_rates(self) -> list[float]:
        """Of each flat tensor in the next optimizer step."""
        if self._stage == 0:
            return [float(group["lr"]) for group in self._optimizer.param_groups for _ in group["params"]]
        groups = self._optimizer.optimizer.param_groups
        if self._stage == 3:
            group_of = self._optimizer.sub_group_to_group_id
            return [float(groups[group_of[index]]["lr"]) for index in range(len(self.flats))]
        return [float(group["lr"]) for group in groups]

    def pieces(self) -> Iterator[Piece]:
        """Which elements of which parameters the flat tensors hold; padding belongs to none."""
        names = {parameter: name for name, parameter in self._engine.module.named_parameters()}
        if self._stage == 0:
            for index, parameter in enumerate(self.flats):
                yield Piece(names[parameter], index, 0, 0, parameter.numel())
        elif self._stage == 3:
            yield from self._partitioned_pieces(names)
        else:
            for index, group in enumerate(self._optimizer.bit16_groups):
                for parameter in group:
                    mapping = parameter._hp_mapping
                    if mapping is not None:  # some of it lies in this rank's stretch
                        place, own = mapping.hp_fragment_address, mapping.lp_fragment_address
                        yield Piece(names[parameter], index, place.start, own.start, place.numel)

    def _partitioned_pieces(self, names: dict[Any, str]) -> Iterator[Piece]:
        for index, group in enumerate(self._optimizer.fp16_groups):
            start = 0
            for parameter in group:
                part = parameter.ds_tensor.ds_numel
                offset = part * self._optimizer._get_param_partition_rank(parameter)
                yield Piece(names[parameter], index, start, offset, max(0, min(part, parameter.ds_numel - offset)))
                start += part
