"""One plain PyTorch process against our ranks: the same model folder, the same global batches, every step compared.

Accumulation is on, clipping is active at every step, the counts of targets differ between micro batches, documents are
packed, and the learning rate warms up.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from tests.support import reference
from tests.support.ranks import Ranks

STEPS = 20
GLOBAL_BATCH = 8
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 1e-5
"""Relative. A norm is a sum over 100,000 squares in another order."""

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Four key-value heads: enough for four tensor-parallel ranks."""

_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_QWEN, "head_dim": 8, "mlp_only_layers": [0], "norm_topk_prob": True},
}
"""Small mixtures of experts; one of them with a shared expert, one with a dense layer."""

_OF_THE_LAYOUT = {"micro_batch_size", "gradient_checkpointing", "mlp_tiles", "loss_tiles"}
"""Settings that change nothing of what is learned."""


@dataclass
class Equality:
    """Makes models and references once, and compares runs with them."""

    folder: Path
    base_recipe: Path
    tokenizer: Path
    _models: dict[str, Path] = field(default_factory=dict)
    _references: dict[str, tuple[PreparedData, reference.Reference]] = field(default_factory=dict)

    def model(self, model_type: str = "llama", **changes: Any) -> Path:
        """A Hugging Face folder with random weights and the trained tokenizer."""
        key = json.dumps([model_type, changes])
        if key not in self._models:
            path = self.folder / f"model_{len(self._models)}"
            torch.manual_seed(3)
            config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **changes})
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
            AutoTokenizer.from_pretrained(self.tokenizer).save_pretrained(path)
            self._models[key] = path
        return self._models[key]

    def run(
        self,
        ranks: Ranks,
        model: Path,
        *overrides: str,
        micro: int | None = None,
        data_parallel: int | None = None,
        stop_after: int | None = None,
    ) -> tuple[RunDirectory, Plan, list[dict[str, Any]]]:
        """Train on live ranks; returns the run and its records of losses."""
        replicas = data_parallel or ranks.size
        micro = micro or GLOBAL_BATCH // (2 * replicas)
        recipe = load_recipe(
            self.base_recipe,
            (
                "model.config=null", f"model.model_name_or_path={model}", "tokenizer.train=null",
                f"micro_batch_size={micro}", f"global_batch_size={GLOBAL_BATCH}", "gradient_accumulation_steps=null",
                f"max_steps={STEPS}", *overrides,
            ),
        )  # fmt: skip
        plan = make_plan(recipe, Resources(workers_per_node=ranks.size))
        assert plan.batch.gradient_accumulation_steps > 1
        assert plan.layout.data_parallel_size == replicas
        directory = RunDirectory.at(self.folder / f"run_{len(list(self.folder.glob('run_*')))}")
        write_run(directory, plan)
        data = self.reference(model, plan)[0]
        ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory), stop_after=stop_after)
        return directory, plan, [r for r in read_json_lines(directory.metrics) if "loss" in r]

    def reference(self, model: Path, plan: Plan) -> tuple[PreparedData, reference.Reference]:
        """The plain run of the plan's recipe; it does not depend on the layout, so it is made once."""
        recipe = plan.recipe
        training = recipe.training.model_dump(exclude=_OF_THE_LAYOUT)
        key = json.dumps([str(model), recipe.optimizer.model_dump(), training], default=str)
        micro_batches = _micro_batches(plan)
        if recipe.training.router_aux_loss_coef:
            key += str(micro_batches)
        if key not in self._references:
            data = prepare(recipe, progress=False)
            plain = reference.train(data.directory, model, recipe, GLOBAL_BATCH, STEPS, micro_batches)
            assert plain.losses[0] - plain.losses[-1] > 0.3, (
                "the model did not learn, so equal losses would show little"
            )
            self._references[key] = data, plain
        return self._references[key]

    def evaluate(self, model: Any, data: PreparedData, samples: int) -> tuple[float, int]:
        """Sum of the plain model's loss over the validation samples that a run chooses, and their targets."""
        (rows,) = data.split("validation")
        total, count = 0.0, 0
        for index in range(samples):
            row = rows[index * len(rows) // samples]  # spread evenly
            ids, labels, positions = (torch.from_numpy(row[k])[None] for k in ("input_ids", "labels", "position_ids"))
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            targets = labels[:, 1:].flatten()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
                )
            )
            count += int((targets != -100).sum())
        return total, count

    def check(
        self,
        ranks: Ranks,
        *overrides: str,
        model: Path | None = None,
        micro: int | None = None,
        data_parallel: int | None = None,
        loss: float = LOSS_TOLERANCE,
        norm: float = NORM_TOLERANCE,
    ) -> tuple[RunDirectory, Plan]:
        """Train, and compare each step's loss and gradient norm with the plain run's."""
        model = model or self.model()
        directory, plan, records = self.run(ranks, model, *overrides, micro=micro, data_parallel=data_parallel)
        plain = self.reference(model, plan)[1]
        clip = plan.recipe.training.max_grad_norm
        assert clip == 0 or min(plain.grad_norms) > clip, "clipping was not active at every step"
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=loss, rel=0)
        assert [record["grad_norm"] for record in records] == pytest.approx(plain.grad_norms, rel=norm, abs=0)
        return directory, plan


def _micro_batches(plan: Plan) -> list[list[int]]:
    """Which samples of a global batch each rank takes together: of n ranks, rank r has every n-th from the r-th on."""
    replicas, micro = plan.layout.data_parallel_size, plan.batch.micro_batch_size
    own = [list(range(rank, GLOBAL_BATCH, replicas)) for rank in range(replicas)]
    return [samples[start : start + micro] for samples in own for start in range(0, len(samples), micro)]


RanksOf = Callable[[int], Ranks]
