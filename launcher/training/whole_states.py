"""A checkpoint's states by parameter, joined from the ranks that hold parts of the model, whatever layout saved it."""

from pathlib import Path
from typing import Any

import torch

from launcher.checkpoints.manifest import Manifest
from launcher.models.pieces import transformers_name
from launcher.training.joining import divided_dimension, pipeline_patterns, split_patterns, whole
from launcher.training.shards import Shards


class WholeStates:
    """The states of every parameter, whole and under the names of the whole model.

    Args:
        folder: of the checkpoint.
        manifest: of it.

    Attributes:
        shapes: of every trained parameter, by name.
        first: what the first model-parallel rank saved, for all that is not by parameter.
        extras: buffers and frozen parameters, by name.

    Raises:
        CheckpointError: a file cannot be read, or does not hold what DeepSpeed writes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        layout = manifest.layout
        width = layout.tensor_parallel_size
        stages = [
            [Shards(folder, manifest, stage * width + rank) for rank in range(width)]
            for stage in range(layout.pipeline_parallel_size)
        ]
        self.first = stages[0][0]
        self._places: dict[str, tuple[list[Shards], str]] = {}
        for ranks in stages:
            for own in ranks[0].shapes:
                # A weight that is tied to another stage's has the same values there.
                self._places.setdefault(transformers_name(own) if len(stages) > 1 else own, (ranks, own))
        self._dims: dict[str, int | None] = dict.fromkeys(self._places)
        if width > 1:
            split = split_patterns(folder, self.first.written) if len(stages) == 1 else pipeline_patterns(self._places)
            self._dims = {name: divided_dimension(name, split) for name in self._places}
        self.shapes = {name: self._shape(name) for name in self._places}
        self.extras = self.first.extras
        if width > 1:  # where nothing is frozen; what is left besides buffers is the other name of a tied weight
            self.extras = {name: self.extras[name] for name in self.first.model_state["buffer_names"]}

    def _shape(self, name: str) -> torch.Size:
        ranks, own = self._places[name]
        dim = self._dims[name]
        shape = list(ranks[0].shapes[own])
        if dim is not None:
            shape[dim] = sum(part.shapes[own][dim] for part in ranks)
        return torch.Size(shape)

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """A parameter's whole state, contiguous, fp32."""
        ranks, own = self._places[name]
        dim = self._dims[name]
        return whole([part.tensor(own, key) for part in (ranks if dim is not None else ranks[:1])], dim)

    def step(self, name: str) -> Any:
        """How many updates the optimizer made."""
        ranks, own = self._places[name]
        return ranks[0].step(own)
