"""Validation during training: exact mean loss over all targets, and generated samples."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.data.loader import Collate, evaluation_batches
from launcher.models.parallel import whole_logits
from launcher.models.sequence import whole_sequences
from launcher.planning.layout import Coordinates
from launcher.planning.plan import Plan
from launcher.tasks import Sample
from launcher.training.distributed import sum_over_ranks
from launcher.training.passes import Passes, counts
from launcher.training.upstream import set_training


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over the validation samples.

    Attributes:
        loss: mean over all targets of all ranks, in nats.
        num_targets: how many there were.
    """

    loss: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    passes: Passes,
    collate: Collate,
    datasets: Sequence[Sequence[Sample]],
    plan: Plan,
    place: Coordinates,
    device: torch.device,
) -> Evaluation:
    """Evaluate on all ranks together; every validation sample counts once.

    Sums are kept in float64, so the mean does not depend on the number of ranks beyond the order of additions.
    """
    batches = evaluation_batches(
        datasets,
        plan.batch.micro_batch_size,
        place.data,
        plan.layout.data_parallel_size,
        plan.recipe.evaluation.max_eval_samples,
        collate,
    )
    loss_sum, num_targets = passes.evaluate(batches)
    if not counts(plan, place):
        loss_sum, num_targets = 0.0, 0
    total_loss, total_targets = sum_over_ranks(loss_sum, float(num_targets), device=device)
    return Evaluation(total_loss / max(total_targets, 1.0), int(total_targets))


@torch.no_grad()
def generate(
    engine: Any, plan: Plan, tokenizer_directory: Path, step: int, device: torch.device, place: Coordinates
) -> dict[str, str]:
    """Continue each prompt of the recipe, on as few ranks as hold the model between them.

    These are all ranks under ZeRO 3, otherwise the first tensor-parallel group; all of them do the same.

    Returns:
        Continuation by prompt; empty on ranks that did not generate.
    """
    settings = plan.recipe.evaluation.generate
    if not settings.prompts or (plan.zero_stage != 3 and (place.data, place.sequence) != (0, 0)):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    limit = plan.model.max_position_embeddings if plan.model else None
    set_training(engine, False)
    texts = {}
    # The same seed on every rank: all must sample the same tokens, or one would stop earlier and hang the rest.
    with ExitStack() as stack, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(plan.recipe.seed + step)
        stack.enter_context(whole_logits(engine))
        stack.enter_context(whole_sequences(engine))
        for prompt in settings.prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(device)
            room = settings.max_new_tokens if limit is None else limit - inputs["input_ids"].shape[1]
            output = engine.module.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max(1, min(settings.max_new_tokens, room)),
                do_sample=settings.temperature > 0,
                temperature=settings.temperature or None,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
            texts[prompt] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    set_training(engine, True)
    return texts
