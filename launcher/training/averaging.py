"""The exponential moving average of the trained weights: each rank averages its own part, in fp32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.recipe.training_sections import EmaSection
from launcher.training.checkpoint_files import read_state
from launcher.training.fp32_weights import Fp32Weights

FOLDER = "ema"
"""Of the universal form: a file a parameter with its average."""


def average_file(rank: int) -> str:
    """Name of the file in a checkpoint that holds a data-parallel rank's averages."""
    return f"ema_rank_{rank:05d}.pt"


class WeightAverage:
    """`average = decay x average + (1 - decay) x weights` after each step; the first average is the first weights.

    Args:
        weights: of this rank.
        section: `training.ema` of the recipe.
        rank: data-parallel rank; under ZeRO 0, where all ranks have the same, 0 on each of them.
    """

    def __init__(self, weights: Fp32Weights, section: EmaSection, rank: int) -> None:
        self._weights = weights
        self._section = section
        self._file = average_file(rank)
        self._averages = [flat.detach().clone() for flat in weights.flats]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after so many optimizer steps."""
        flats = [flat.detach() for flat in self._weights.flats]
        decay = decay_at(self._section, step)
        torch._foreach_lerp_(self._averages, flats, 1 - decay)

    def restart(self) -> None:
        """Begin again with the weights as they are now."""
        for average, flat in zip(self._averages, self._weights.flats, strict=True):
            average.copy_(flat.detach())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; collective. No optimizer step may be made in it.

        An exception ends the training, and leaves them: the other ranks are elsewhere and would not take part.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, flat in zip(self._averages, self._weights.flats, strict=True):
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
        self._weights.put_to_use()

    def save(self, files: Any, folder: Path) -> None:
        """Hand the averages to what writes a checkpoint's files (`CheckpointFiles`)."""
        files.save({"averages": self._averages}, str(folder / self._file))

    def load(self, folder: Path, read: Callable[[Path], Any]) -> None:
        """Read what `save` wrote in this very layout.

        Args:
            folder: of the checkpoint.
            read: one of its files.

        Raises:
            CheckpointError: the file cannot be read, or holds other shapes.
        """
        saved: list[Tensor] = read(folder / self._file)["averages"]
        if [tensor.shape for tensor in saved] != [tensor.shape for tensor in self._averages]:
            raise CheckpointError(f"{folder / self._file} does not hold this layout's averages")
        for average, tensor in zip(self._averages, saved, strict=True):
            average.copy_(tensor)

    def load_universal(self, folder: Path) -> None:
        """Read this rank's part of what `write_universal` wrote from another layout.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for piece in self._weights.pieces():
            whole = read_state(folder / FOLDER / f"{piece.name}.pt", mapped=True)["param"].flatten()
            place = self._averages[piece.flat].flatten().narrow(0, piece.start, piece.numel)
            place.copy_(whole.narrow(0, piece.offset, piece.numel))


def decay_at(section: EmaSection, step: int) -> float:
    """What is kept of the average at a step, from 1."""
    return min(section.decay, (1 + step) / (10 + step)) if section.warmup else section.decay


def read_averages(path: Path, *, mapped: bool = False) -> list[Tensor]:
    """Averages that `WeightAverage.save` wrote.

    Raises:
        CheckpointError: the file cannot be read.
    """
    averages: list[Tensor] = read_state(path, mapped=mapped)["averages"]
    return averages


def has_averages(manifest: Manifest) -> bool:
    """Whether a checkpoint holds averages."""
    return manifest.recipe.training.ema is not None
