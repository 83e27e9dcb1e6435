"""An independent reference: one process, plain PyTorch. Shares the model class and the batches, nothing else."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from launcher.data.sampler import GlobalOrder
from launcher.data.store import PreparedData


@dataclass(frozen=True)
class Reference:
    """Per-step losses (mean over all targets of the global batch) and gradient norms before clipping."""

    losses: list[float]
    grad_norms: list[float]


def global_batch(data: Path, seed: int, step: int, size: int) -> dict[str, torch.Tensor]:
    """Rows of one global batch, in the global order."""
    (dataset,) = PreparedData.load(data).split("train")
    order = GlobalOrder([len(dataset)], [1.0], seed=seed, shuffle=True)
    _, rows, _ = order.locate(np.arange(step * size, (step + 1) * size, dtype=np.int64))
    samples = [dataset[int(row)] for row in rows]
    return {
        name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in ("input_ids", "labels", "position_ids")
    }


def train(
    data: Path,
    model_folder: Path,
    recipe: Any,
    global_batch_size: int,
    steps: int,
    micro_batches: list[list[int]],
    importance: dict[str, torch.Tensor] | None = None,
) -> Reference:
    """Train on whole global batches; the micro batches matter to the balance of experts alone, `importance` to EWC."""
    attention = recipe.model.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)
    o, t = recipe.optimizer, recipe.training
    optimizers = make_optimizers(model, o, t.learning_rate)
    start = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(data, recipe.seed, step, global_batch_size)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group["peak"] * cosine_with_warmup(step, t.warmup_steps, t.max_steps)
            if o.unfreeze_every_steps is not None and group["layers_above"] > step // o.unfreeze_every_steps:
                group["lr"] = 0.0
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        output = model(**inputs, **({"output_router_logits": True} if t.router_aux_loss_coef else {}))
        logits, targets = output.logits, batch["labels"][:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, ignore_index=-100)
        if t.router_aux_loss_coef:
            balance = load_balance(output.router_logits, batch["labels"], micro_batches, model.num_experts_per_tok)
            loss = loss + t.router_aux_loss_coef * balance
        model.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm or math.inf)))
        with torch.no_grad():
            for parameter in [p for g in optimizers[0].param_groups for p in g["params"] if o.decay_to_start]:
                rate = next(g["lr"] for g in optimizers[0].param_groups if any(p is parameter for p in g["params"]))
                parameter -= rate * o.decay_to_start * (parameter - start[id(parameter)])
            for name, parameter in model.named_parameters() if importance is not None else ():
                rate = next(g["lr"] for g in optimizers[0].param_groups if any(p is parameter for p in g["params"]))
                share = (rate * o.ewc.strength * importance[name]).clamp(max=1.0)
                parameter -= share * (parameter - start[id(parameter)])
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return Reference(losses, norms)


def load_balance(
    router_logits: tuple[torch.Tensor, ...], labels: torch.Tensor, micro_batches: list[list[int]], chosen: int
) -> torch.Tensor:
    """The mean over micro batches, by their targets, of experts x sum of (share of the choices x mean probability).

    Fedus et al., arXiv 2101.03961, equations 4 to 6, over the tokens of all layers together.
    """
    samples, length = labels.shape
    counts = (labels[:, 1:] != -100).sum(dim=1)
    total = torch.zeros(())
    for rows in micro_batches:
        logits = torch.cat([layer.view(samples, length, -1)[rows].flatten(0, 1) for layer in router_logits])
        probabilities = logits.softmax(-1)
        choices = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen).indices, 1.0)
        balance = probabilities.shape[1] * (choices.mean(0) * probabilities.mean(0)).sum()
        total = total + balance * counts[rows].sum() / counts.sum()
    return total


def make_optimizers(model: torch.nn.Module, section: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    """What a recipe's section means, of torch but for Muon; each group knows its `peak` rate."""
    matrices = []
    if section.type == "muon":
        outside = ("embed", "lm_head")
        matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and not any(part in n for part in outside)]
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if section.unfreeze_every_steps is not None:
        layers = model.config.num_hidden_layers
        above = {id(p): layers - int(n.split(".")[2]) if ".layers." in n else (layers + 1) * ("embed" in n)
                 for n, p in model.named_parameters()}  # fmt: skip
        groups = [{**group, "params": [p], "layers_above": above[id(p)]} for group in groups for p in group["params"]]
    peak = section.adam_learning_rate or learning_rate
    optimizers: list[torch.optim.Optimizer]
    if section.type == "sgd":
        optimizers = [torch.optim.SGD(groups, lr=peak, momentum=section.momentum or 0.0)]
    elif section.type == "adafactor":
        optimizers = [torch.optim.Adafactor(groups, lr=peak)]
    elif section.type == "lion":
        optimizers = [PlainLion(groups, {"lr": peak, "betas": (section.adam_beta1, section.adam_beta2)})]
    else:
        betas = (section.adam_beta1, section.adam_beta2)
        optimizers = [torch.optim.AdamW(groups, lr=peak, betas=betas, eps=section.adam_epsilon)]
    for group in optimizers[0].param_groups:
        group["peak"] = peak
    if matrices:
        momentum = 0.95 if section.momentum is None else section.momentum
        optimizers.append(Muon(matrices, learning_rate, section.weight_decay, momentum))
    return optimizers


class PlainLion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2, letter by letter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for theta in group["params"]:
                g, state = theta.grad, self.state[theta]
                m = state.get("m", torch.zeros_like(theta))
                c = b1 * m + (1 - b1) * g
                theta.copy_(theta - group["lr"] * (torch.sign(c) + group["weight_decay"] * theta))
                state["m"] = b2 * m + (1 - b2) * g


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), all of it in fp32."""

    def __init__(self, parameters: list[torch.Tensor], peak: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": peak, "peak": peak, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Nesterov's momentum, its direction made orthogonal, larger for tall matrices."""
        (group,) = self.param_groups
        for parameter in group["params"]:
            moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
            moment.lerp_(parameter.grad, 1 - group["momentum"])
            direction = orthogonal(parameter.grad.lerp(moment, group["momentum"]))
            rows, columns = parameter.shape
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction, alpha=group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration; singular values come near to 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """Linear from 0 to 1, then half a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
