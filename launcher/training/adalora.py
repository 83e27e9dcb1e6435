"""AdaLoRA (Zhang et al., arXiv 2303.10512) under ZeRO 0 to 2: `peft` decides the ranks, the training loop drives it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError, RecipeError
from launcher.recipe.task_sections import AdaLoraSection
from launcher.tasks import Batch, LossOutput
from launcher.training.fp32_weights import Fp32Weights

FILE = "adalora.pt"
"""In a checkpoint: the smoothed importance of each adapter weight, and which ranks are left."""
ADAPTER = "default"
"""peft's name of the one adapter."""
PREFIX = "base_model.model."
"""What peft's model puts before the names that its rank allocator knows."""
CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


def schedule_of(section: AdaLoraSection, total_steps: int) -> tuple[int, int]:
    """Steps before the first rank is taken away, and steps after the last one."""
    first = section.initial_steps if section.initial_steps is not None else total_steps // 10
    last = section.final_steps if section.final_steps is not None else total_steps * 3 // 10
    return first, last


class RankSchedule:
    """Takes ranks away as training goes on: call `before_step` and `after_step` around each optimizer step.

    peft reads gradients from the parameters after the optimizer's step (`tuners/adalora/layer.py: RankAllocator`);
    DeepSpeed has none there, so they are gathered before the step, clipped as the step clips them, and lent to the
    parameters while peft decides. What peft sets to zero is set to zero in the optimizer's fp32 weights too.

    Args:
        engine: around peft's model.
        zero_stage: 0 to 2.
        section: of the recipe.
        total_steps: of the run.
        max_grad_norm: of the recipe; 0: gradients are not clipped.
        step: tells how many steps have been made.

    Raises:
        RecipeError: the schedule leaves no step in which ranks can be taken away.
    """

    def __init__(
        self,
        engine: Any,
        zero_stage: int,
        section: AdaLoraSection,
        total_steps: int,
        max_grad_norm: float,
        step: Callable[[], int],
    ) -> None:
        self._engine, self._step, self._max_norm = engine, step, max_grad_norm
        self._model = engine.module.base_model
        self._config = self._model.peft_config[ADAPTER]
        first, last = schedule_of(section, total_steps)
        if first + last >= total_steps:
            raise RecipeError.single(
                "adapter.adalora",
                f"initial_steps {first} and final_steps {last} leave none of the run's {total_steps} steps between "
                "them, in which ranks are taken away; make them fewer",
            )
        self._config.tinit, self._config.tfinal, self._config.deltaT = first, last, section.interval
        self._config.total_step = total_steps
        self._decided = total_steps - last
        self._parameters = {
            name: parameter
            for name, parameter in self._model.model.named_parameters()
            if "lora_" in name and parameter.requires_grad
        }
        self._weights = Fp32Weights(engine, zero_stage) if zero_stage else None
        self._gradients: dict[str, Tensor] = {}

    @property
    def ranks(self) -> dict[str, list[bool]] | None:
        """Which ranks of each matrix are left; `None` as long as all are."""
        pattern: dict[str, list[bool]] | None = self._config.rank_pattern
        return pattern

    def before_step(self) -> None:
        """Gather the step's gradients, on all ranks together."""
        self._gradients = {}
        if self._step() + 1 < self._decided:
            for name, parameter in self._parameters.items():
                self._gradients[name] = averaged_gradient(parameter)

    @torch.no_grad()
    def after_step(self, step: int, grad_norm: float | None) -> None:
        """Let peft measure and decide, after so many steps."""
        clip = 1.0
        if self._max_norm and grad_norm is not None:
            clip = min(1.0, self._max_norm / (grad_norm + CLIP_EPSILON))
        for name, gradient in self._gradients.items():
            self._parameters[name].grad = (gradient * clip).to(self._parameters[name].dtype)
        before = self.ranks
        self._model.update_and_allocate(step)
        for parameter in self._parameters.values():
            parameter.grad = None
        if self.ranks is not None and (self.ranks is not before or step > self._decided):
            self._mask(self.ranks)

    def _mask(self, ranks: dict[str, list[bool]]) -> None:
        if self._weights is None:
            return
        for piece in self._weights.pieces():
            left = ranks.get(piece.name.removeprefix(PREFIX))
            if left is not None:
                own = self._weights.flats[piece.flat].narrow(0, piece.start, piece.numel)
                own.mul_(torch.tensor(left, device=own.device).narrow(0, piece.offset, piece.numel))

    def save(self, files: Any, folder: Path) -> None:
        """Hand the state, which all ranks share, to what writes a checkpoint's files; on rank 0."""
        allocator = self._model.rankallocator
        state = {"importance": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc, "ranks": self.ranks}
        if files.rank == 0:
            files.save(state, str(folder / FILE))

    def load(self, folder: Path, manifest: Manifest, read: Callable[[Path], Any]) -> None:
        """Read what `save` wrote.

        Args:
            folder: of the checkpoint.
            manifest: of it.
            read: one of its files.

        Raises:
            CheckpointError: it is not there, or of another adapter.
        """
        if FILE not in manifest.files:
            raise CheckpointError(f"{folder} was saved without adapter.method adalora: start a new run with --run-dir")
        state, allocator = read(folder / FILE), self._model.rankallocator
        if not set(state["importance"]) <= set(self._parameters):
            raise CheckpointError(f"{folder / FILE} does not hold this adapter's ranks")
        for name, values in state["importance"].items():
            device = self._parameters[name].device
            allocator.exp_avg_ipt[name] = values.to(device)
            allocator.exp_avg_unc[name] = state["uncertainty"][name].to(device)
            allocator.ipt[name] = torch.zeros_like(allocator.exp_avg_ipt[name])
        self._config.rank_pattern = state["ranks"]


def averaged_gradient(parameter: Any) -> Tensor:
    """A parameter's whole gradient, averaged over all ranks, between the last backward pass and the step.

    Under ZeRO 1 and 2 each rank has its part of it (DeepSpeed, `utils/tensor_fragment.py: get_full_hp_grad`), and
    `parameter.grad`, where there is one, is this rank's own.
    """
    whole = parameter.get_full_hp_grad() if hasattr(parameter, "_hp_mapping") else parameter.grad
    copy: Tensor = whole.detach().clone()
    return copy


def orthogonal_loss(
    loss: Callable[[Any, Batch], LossOutput], section: AdaLoraSection
) -> Callable[[Any, Batch], LossOutput]:
    """Add what keeps each matrix's directions orthogonal to a task's loss, while the model is training.

    peft adds it in its forward pass to a loss that the model itself computes (`tuners/adalora/model.py: forward`); ours
    are computed outside. It counts by the micro batch's targets, so that a step adds it once.
    """

    def together(model: Any, batch: Batch) -> LossOutput:
        output = loss(model, batch)
        if not model.training:
            return output
        penalty = section.orthogonality * orthogonality(getattr(model, "module", model))
        return replace(output, loss_sum=output.loss_sum + output.num_targets * penalty)

    return together


def orthogonality(model: torch.nn.Module) -> Tensor:
    """Mean over the adapter's matrices of the Frobenius norm of (products of their directions - identity), in fp32."""
    norms = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name):
            rows = parameter.float() if ".lora_A." in name else parameter.float().T
            norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
    return torch.stack(norms).mean()
