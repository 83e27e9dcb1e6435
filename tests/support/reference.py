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
    data: Path, model_folder: Path, recipe: Any, global_batch_size: int, steps: int, micro_batches: list[list[int]]
) -> Reference:
    """Train on whole global batches; the micro batches matter to the balance of experts alone."""
    attention = recipe.model.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    o, t = recipe.optimizer, recipe.training
    groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, o, t.learning_rate)
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(data, recipe.seed, step, global_batch_size)
        for group in optimizer.param_groups:
            group["lr"] = t.learning_rate * cosine_with_warmup(step, t.warmup_steps, t.max_steps)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        output = model(**inputs, **({"output_router_logits": True} if t.router_aux_loss_coef else {}))
        logits, targets = output.logits, batch["labels"][:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, ignore_index=-100)
        if t.router_aux_loss_coef:
            balance = load_balance(output.router_logits, batch["labels"], micro_batches, model.num_experts_per_tok)
            loss = loss + t.router_aux_loss_coef * balance
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm or math.inf)))
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


def make_optimizer(groups: list[dict[str, Any]], section: Any, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of torch that a recipe's section means."""
    if section.type == "adamw":
        betas = (section.adam_beta1, section.adam_beta2)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=section.adam_epsilon)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=section.momentum)


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """Linear from 0 to 1, then half a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
