"""Forward and backward over the micro batches of one step, and the optimizer's step: what differs between layouts.

The loss of a step is `sum over all targets of the global batch / their count`. Each micro batch's sum is divided by the
global count, and multiplied by the number of ranks over which DeepSpeed averages gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from launcher.data.loader import Collate
from launcher.errors import RecipeError
from launcher.planning.layout import Coordinates, Layout
from launcher.planning.plan import Plan
from launcher.tasks import Batch, Sample, Task
from launcher.training.adalora import orthogonal_loss
from launcher.training.adversarial import adversarial_loss
from launcher.training.context import Heartbeat, Phase
from launcher.training.distributed import Agreement
from launcher.training.numeric import StepJudge
from launcher.training.skipping import discard_step
from launcher.training.upstream import averaging_ranks, set_training, step_and_norm, to_device


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step measured.

    Attributes:
        loss_sum: this rank's, a float64 scalar still on the device: reading it would wait for the device.
        num_targets: of the global batch.
        grad_norm: over all parameters, before clipping.
        stop: some rank was asked to stop after this step.
        save: rank 0 wants a checkpoint after this step.
        refused: why the step was not made; None: it was.
    """

    loss_sum: torch.Tensor
    num_targets: int
    grad_norm: float | None
    stop: bool
    save: bool
    refused: str | None = None


class Passes(Protocol):
    """How a layout runs a task's micro batches."""

    def train(
        self, micro_batches: Sequence[Batch], agreement: Agreement, judge: StepJudge | None = None
    ) -> StepOutcome:
        """Make one optimizer step on this rank's micro batches, unless the judge refuses it."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Sum the loss over this rank's validation batches, without gradients; returns (loss sum, targets)."""
        ...


class DirectPasses:
    """Each rank runs the whole depth of the model: data, tensor, sequence and expert parallelism."""

    def __init__(
        self,
        plan: Plan,
        engine: Any,
        task: Task,
        device: torch.device,
        heartbeat: Heartbeat,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.task = task
        self.before_step = before_step
        adversarial = plan.recipe.training.adversarial
        if adversarial is not None and plan.zero_stage == 3:
            raise RecipeError.single("training.adversarial", "is for ZeRO stages 0 to 2; set zero.stage to 2")
        self._train_loss = task.loss if adversarial is None else adversarial_loss(task.loss, adversarial)
        adapter = plan.recipe.adapter
        if adapter is not None and adapter.method == "adalora" and adapter.adalora.orthogonality:
            self._train_loss = orthogonal_loss(self._train_loss, adapter.adalora)
        self.device = device
        self.heartbeat = heartbeat
        self._ranks = averaging_ranks(plan.layout, plan.zero_stage)

    def train(
        self, micro_batches: Sequence[Batch], agreement: Agreement, judge: StepJudge | None = None
    ) -> StepOutcome:
        """Forward and backward for each micro batch; the last one ends with the optimizer's step."""
        engine, heartbeat = self.engine, self.heartbeat
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        num_targets, stop, save = 0, False, False
        for index, host_batch in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            heartbeat.enter(Phase.FORWARD)
            output = self._train_loss(engine, to_device(host_batch, self.device))
            loss_sum += output.loss_sum.detach()
            if index == 0:
                heartbeat.enter(Phase.AGREE)
                num_targets, stop, save = agreement.read()
            if last and judge is not None:
                judge.begin(loss_sum, num_targets)
            heartbeat.enter(Phase.BACKWARD)
            engine.backward(output.loss_sum * (self._ranks / max(num_targets, 1)), scale_wrt_gas=False)
            heartbeat.enter(Phase.OPTIMIZER)
            if not last:
                engine.step()
        refused = None if judge is None else judge.refuses()
        grad_norm = None
        if refused is None:
            grad_norm = self._step()
        else:
            discard_step(engine, self.plan.zero_stage)
        return StepOutcome(loss_sum, num_targets, grad_norm, stop, save, refused)

    def _step(self) -> float | None:
        recipe = self.plan.recipe
        self.before_step()
        return step_and_norm(self.engine, self.plan.zero_stage, recipe.training.precision, recipe.optimizer.type)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Forward for each batch."""
        set_training(self.engine, False)
        loss_sum, num_targets = 0.0, 0
        for batch in batches:
            output = self.task.loss(self.engine, to_device(batch, self.device))
            loss_sum += output.loss_sum.item()
            num_targets += int(output.num_targets.item())
        set_training(self.engine, True)
        return loss_sum, num_targets


class _LastStage:
    """Stands for the model towards the task's loss: gives it logits that are there already."""

    def __init__(self, pipeline: Any, logits: torch.Tensor) -> None:
        self.get_output_embeddings = pipeline.get_output_embeddings
        self._logits = logits

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self._logits)


class PipelinePasses:
    """DeepSpeed's pipeline schedule (one forward, one backward; Narayanan et al., arXiv 2104.04473)."""

    def __init__(self, plan: Plan, engine: Any, task: Task, device: torch.device, heartbeat: Heartbeat) -> None:
        self.plan = plan
        self.engine = engine
        self.task = task
        self.device = device
        self.heartbeat = heartbeat
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._scale: Callable[[], float] | None = None
        engine.module.loss_fn = self._loss

    def train(
        self, micro_batches: Sequence[Batch], agreement: Agreement, judge: StepJudge | None = None
    ) -> StepOutcome:
        """Run the schedule over all micro batches; it ends with the optimizer's step, and nobody is asked before."""
        agreed = cache(agreement.read)
        # The engine divides by the number of micro batches and averages over data-parallel ranks.
        factor = self.plan.layout.data_parallel_size * len(micro_batches)
        self._begin(lambda: factor / max(agreed()[0], 1))
        self.heartbeat.enter(Phase.FORWARD)
        self.engine.train_batch(_staged(micro_batches))
        norm = self.engine.get_global_grad_norm()
        num_targets, stop, save = agreed()
        return StepOutcome(self._loss_sum, num_targets, None if norm is None else float(norm), stop, save)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Run all batches through the stages, without gradients."""
        micro_batches = list(batches)
        self._begin(None)
        if micro_batches:
            self.engine.eval_batch(
                _staged(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
            )
        return self._loss_sum.item(), sum(map(self.task.num_targets, micro_batches))

    def _begin(self, scale: Callable[[], float] | None) -> None:
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self._scale = scale

    def _loss(self, logits: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Called by the engine on the last stage for each micro batch."""
        model: Any = _LastStage(self.engine.module, logits)
        output = self.task.loss(model, dict(zip(_FIELDS, batch, strict=True)))
        self._loss_sum += output.loss_sum.detach()
        return output.loss_sum if self._scale is None else output.loss_sum * self._scale()


_FIELDS = ("input_ids", "position_ids", "labels")


def _staged(micro_batches: Sequence[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
    """What the first stage takes of each micro batch, and what the last one does."""
    for batch in micro_batches:
        yield (batch["input_ids"], batch["position_ids"]), tuple(batch[name] for name in _FIELDS)


def make_passes(
    plan: Plan,
    engine: Any,
    task: Task,
    device: torch.device,
    heartbeat: Heartbeat,
    before_step: Callable[[], None] = lambda: None,
) -> Passes:
    """Choose how the plan's layout runs.

    `before_step` is called when a step's gradients are there; not in a pipeline, where nothing needs it.
    """
    if plan.layout.pipeline_parallel_size > 1:
        return PipelinePasses(plan, engine, task, device, heartbeat)
    return DirectPasses(plan, engine, task, device, heartbeat, before_step)


def own_part(collate: Collate, layout: Layout, place: Coordinates) -> Collate:
    """Make a collate function return this rank's part of each sequence: its share of the positions, in order."""
    size = layout.sequence_parallel_size
    if size == 1:
        return collate

    def collate_part(samples: Sequence[Sample]) -> Batch:
        batch = collate(samples)
        return {name: tensor.chunk(size, dim=1)[place.sequence] for name, tensor in batch.items()}

    return collate_part


def counts(plan: Plan, place: Coordinates) -> bool:
    """Whether a rank's loss sums count: of ranks that see the same targets, only one's do.

    Tensor-parallel ranks all have the same loss; of a pipeline's stages, the last one has it.
    """
    return place.tensor == 0 and place.pipeline == plan.layout.pipeline_parallel_size - 1
