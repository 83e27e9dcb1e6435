"""Adversarial training: the loss on inputs that are disturbed so as to raise it, besides the loss on the true ones.

What is disturbed are the outputs of the token embeddings, or the first floating-point input of a model that has none
(pixels).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from launcher.errors import ModelError
from launcher.recipe.training_sections import AdversarialSection
from launcher.tasks import Batch, LossOutput

Loss = Callable[[Any, Batch], LossOutput]
PGD_REACH = 1.5
"""All steps of PGD together could go so many epsilons far."""


def adversarial_loss(loss: Loss, section: AdversarialSection) -> Loss:
    """Return a loss that is the sum of `loss` on true and on disturbed inputs, while the model is training."""

    def together(model: Any, batch: Batch) -> LossOutput:
        if not model.training:
            return loss(model, batch)
        # One loss alone passes through the engine: DeepSpeed takes any backward pass of what its forward gave out, one
        # to the inputs too, for the step's own (`runtime/base_optimizer.py: _run_post_backward`).
        engine, model = model, getattr(model, "module", model)
        with torch.random.fork_rng(devices=_devices(batch)):
            with _recorded(model) as inputs:
                probe = loss(model, batch)
            (gradient,) = torch.autograd.grad(probe.loss_sum, inputs)
        clean = loss(engine, batch)
        disturbance = _step(torch.zeros_like(gradient), gradient, section.epsilon, section.epsilon)
        if section.method == "pgd":
            length = PGD_REACH * section.epsilon / section.steps
            disturbance = _step(torch.zeros_like(gradient), gradient, length, section.epsilon)
            for _ in range(section.steps - 1):
                disturbance = disturbance.requires_grad_()
                with _disturbed(model, disturbance):
                    (gradient,) = torch.autograd.grad(loss(model, batch).loss_sum, [disturbance])
                disturbance = _step(disturbance.detach(), gradient, length, section.epsilon)
        with _disturbed(model, disturbance):
            hard = loss(model, batch)
        return replace(clean, loss_sum=clean.loss_sum + hard.loss_sum)

    return together


def _devices(batch: Batch) -> list[torch.device]:
    return list({values.device for values in batch.values() if values.device.type == "cuda"})


def _step(disturbance: Tensor, gradient: Tensor, length: float, epsilon: float) -> Tensor:
    """Go so far along each sample's gradient, then back into the ball of radius epsilon."""
    moved = disturbance + length * gradient / _norms(gradient).clamp(min=1e-12)
    return (moved * (epsilon / _norms(moved).clamp(min=epsilon))).detach()


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = values.float().flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1))
    return norms.to(values.dtype)


def _embeddings(model: Any) -> torch.nn.Module | None:
    module = getattr(model, "module", model)
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, torch.nn.Embedding) else None


@contextmanager
def _recorded(model: Any) -> Iterator[list[Tensor]]:
    """Collect what will be disturbed, as it was in the forward passes inside."""
    seen: list[Tensor] = []
    with _changing(model, lambda values: _remember(values, seen)):
        yield seen


def _remember(values: Tensor, seen: list[Tensor]) -> Tensor:
    if seen:
        raise ModelError("training.adversarial needs a model that reads its embeddings once in a forward pass")
    if not values.requires_grad:
        values = values.detach().requires_grad_()
    seen.append(values)
    return values


@contextmanager
def _disturbed(model: Any, disturbance: Tensor) -> Iterator[None]:
    with _changing(model, lambda values: values + disturbance):
        yield


@contextmanager
def _changing(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    embeddings = _embeddings(model)
    if embeddings is not None:
        handle = embeddings.register_forward_hook(lambda module, inputs, output: change(output))
    else:
        handle = getattr(model, "module", model).register_forward_pre_hook(
            lambda module, args, kwargs: _changed_inputs(args, kwargs, change), with_kwargs=True
        )
    try:
        yield
    finally:
        handle.remove()


def _changed_inputs(args: Any, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    for name, values in kwargs.items():
        if isinstance(values, Tensor) and values.is_floating_point():
            return args, {**kwargs, name: change(values)}
    raise ModelError("training.adversarial finds neither token embeddings nor an input of numbers to disturb")
