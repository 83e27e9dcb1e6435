"""The activations of real models, tensor by tensor, against the planner's formulae."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.models.tiling import tile_loss, tile_mlps, tiled_loss_sum
from launcher.planning import layer_adapter
from launcher.planning.activations import ActivationModel, ActivationSettings
from launcher.planning.families import FAMILIES, list_parameters
from launcher.planning.layer_adapter import LayerAdapter
from launcher.planning.layers import LAYERS
from tests.support.live_storages import LiveStorages
from tests.support.small_models import small

pytestmark = pytest.mark.matrix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, LENGTH = 2, 32
PLAIN = ActivationSettings("bf16", BATCH, LENGTH, device="cpu")

VARIANTS = {
    "bf16-packed": {"packed": True},
    "fp32-eager": {"precision": "fp32", "attention": "eager"},
    "bf16-checkpointing": {"gradient_checkpointing": True},
    "fp32-packed-eager-checkpointing": {
        "precision": "fp32", "packed": True, "attention": "eager", "gradient_checkpointing": True,
    },
}  # fmt: skip


def settings(family: str, changes: dict[str, Any]) -> ActivationSettings:
    wanted = replace(PLAIN, **changes)
    return wanted if LAYERS[family].sdpa or wanted.attention == "eager" else replace(wanted, attention="eager")


def measure(config: dict[str, Any], wanted: ActivationSettings) -> tuple[int, int]:
    """Bytes alive after forward and loss, and the most that was alive until the backward pass ended."""
    fields = dict(config)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=wanted.attention, dtype=torch.float32)
    model = model.to(DTYPES[wanted.precision]).train()
    if wanted.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if wanted.adapter is not None:
        model = get_peft_model(model, _peft(wanted.adapter)).to(model.dtype)
    if wanted.mlp_tiles > 1:
        tile_mlps(model, wanted.mlp_tiles)
    if wanted.loss_tiles > 1:
        tile_loss(model)
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.grad = torch.zeros_like(parameter)  # so that gradients are no news to the count
    shape, length = (wanted.micro_batch_size, wanted.sequence_length), wanted.sequence_length
    counter = LiveStorages()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counter.ignore([*model.parameters(), *model.buffers(), *grads])
    with counter:
        ids, labels = (torch.randint(1, made.vocab_size, shape) for _ in range(2))
        positions = (torch.arange(length) % (length // 2 if wanted.packed else length)).repeat(shape[0], 1).clone()
        loss = _loss(model, wanted, ids, positions, labels)
        gc.collect()
        kept = counter.live
        loss.backward()
    return kept, counter.peak


def _peft(adapter: LayerAdapter) -> LoraConfig:
    return LoraConfig(
        r=adapter.rank,
        target_modules=sorted(adapter.targets),
        use_dora=adapter.scaled,
        lora_dropout=0.1 if adapter.dropout else 0.0,
        modules_to_save=[*["lm_head"] * adapter.head, *["embed_tokens"] * adapter.embedding] or None,
    )


def _loss(
    model: Any, wanted: ActivationSettings, ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """As `launcher.tasks.causal_lm` computes it."""
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if wanted.loss_tiles > 1:
        return tiled_loss_sum(model, inputs, labels, wanted.loss_tiles, -100)
    output = model(**inputs, **({"output_router_logits": True} if wanted.balances_experts else {}))
    logits = output.logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    return loss + output.aux_loss if wanted.balances_experts else loss


def planned(config: dict[str, Any], wanted: ActivationSettings) -> tuple[int, int]:
    model = ActivationModel(config, wanted)
    layer, edges = model.decoder_layer(), model.edges()
    kept = edges.first + edges.last + model.values["num_hidden_layers"] * layer.saved
    gradient = max(tensor.numel for tensor in list_parameters(config)) * model.width
    return kept, kept + max(edges.loss, layer.recomputed + layer.backward + gradient)


def cases() -> Iterator[Any]:
    for family in LAYERS:
        for name, changes in VARIANTS.items():
            yield pytest.param(family, changes, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "changes"), cases())
def test_activations_are_what_the_model_keeps(family: str, changes: dict[str, Any]) -> None:
    wanted = settings(family, changes)
    kept, peak = measure(small(family), wanted)
    planned_kept, planned_peak = planned(small(family), wanted)
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert planned_peak >= 0.97 * peak


def test_every_family_that_is_counted_is_measured() -> None:
    assert set(LAYERS) == set(FAMILIES)
    assert len(list(cases())) >= 80


SHAPES = {
    "long": {"sequence_length": 128, "micro_batch_size": 1},
    "wide-batch": {"micro_batch_size": 6},
    "long-eager": {"sequence_length": 128, "micro_batch_size": 1, "attention": "eager"},
    "long-packed": {"sequence_length": 128, "micro_batch_size": 1, "packed": True},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"intermediate_size": 300, "vocab_size": 64}])
def test_other_batches_and_shapes(name: str, changes: dict[str, Any]) -> None:
    wanted = replace(PLAIN, **SHAPES[name])
    config = small("llama", **changes)
    kept, peak = measure(config, wanted)
    planned_kept, planned_peak = planned(config, wanted)
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert planned_peak >= 0.97 * peak


TILED = {
    "mlps": {"mlp_tiles": 4},
    "loss": {"loss_tiles": 4},
    "both-checkpointing": {"mlp_tiles": 4, "loss_tiles": 4, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TILED)
def test_parts_of_the_sequence_keep_less(name: str, precision: str) -> None:
    wanted = replace(PLAIN, precision=precision, sequence_length=128, **TILED[name])
    config = small("llama", intermediate_size=300, vocab_size=2000)
    kept, peak = measure(config, wanted)
    planned_kept, planned_peak = planned(config, wanted)
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert planned_peak >= 0.97 * peak
    whole = planned(config, replace(wanted, mlp_tiles=1, loss_tiles=1))
    assert planned_peak < whole[1]


@pytest.mark.parametrize("changes", [{"precision": "fp32"}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_balanced_routers_keep_their_probabilities(family: str, changes: dict[str, Any]) -> None:
    wanted = replace(PLAIN, balances_experts=True, **changes)
    config = small(family, num_local_experts=32)
    kept, peak = measure(config, wanted)
    planned_kept, planned_peak = planned(config, wanted)
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert planned_peak >= 0.97 * peak


LORA = {
    "queries-and-values": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
KINDS: dict[str, dict[str, bool]] = {
    "lora": {},
    "dora": {"scaled": True},
    "dropout": {"dropout": True},
    "dora-dropout": {"scaled": True, "dropout": True},
    "head": {"head": True},
    "edges-dropout": {"head": True, "embedding": True, "dropout": True},
}
CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.mark.parametrize("changes", [{}, {"precision": "fp32"}, CHECKPOINTING, {"packed": True}], ids=str)
@pytest.mark.parametrize("targets", LORA)
@pytest.mark.parametrize("family", sorted(layer_adapter.FAMILIES))
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_with_an_adapter_keeps(kind: str, family: str, targets: str, changes: dict[str, Any]) -> None:
    wanted = replace(PLAIN, adapter=LayerAdapter(8, frozenset(LORA[targets]), **KINDS[kind]), **changes)
    config = small(family)
    kept, peak = measure(config, wanted)
    planned_kept, planned_peak = planned(config, wanted)
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert planned_peak >= 0.97 * peak


DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "starcoder2", "phi3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_tensor_parallel_rank_keeps_what_a_model_with_its_share_of_heads_keeps(family: str, name: str) -> None:
    # A rank computes just what a model with half of the heads, of the MLP's width and of the vocabulary computes (arXiv
    # 1909.08053, section 3): built as such, it can be measured.
    changes = VARIANTS[name]
    wanted = settings(family, changes)
    config = small(family, num_key_value_heads=4, vocab_size=2000)
    half = {key: value // 2 if key in DIVIDED else value for key, value in config.items()}
    kept, peak = measure(half, wanted)
    planned_kept, _ = planned(config, replace(wanted, tensor_parallel_size=2))
    assert planned_kept == pytest.approx(kept, rel=0.02)
    assert peak > kept


def test_a_sequence_parallel_rank_keeps_its_part_of_the_tokens() -> None:
    # Ulysses (arXiv 2309.14509): half of the tokens everywhere, but all of them for half of the heads in attention.
    whole = ActivationModel(small("llama"), replace(PLAIN, precision="fp32"))
    part = ActivationModel(small("llama"), replace(PLAIN, precision="fp32", sequence_parallel_size=2))
    assert part.decoder_layer().saved == whole.decoder_layer().saved // 2
    assert part.edges().loss == whole.edges().loss // 2


def test_megatrons_formula_for_its_own_layer() -> None:
    # Korthikanti et al. (arXiv 2205.05198), equation 1, count 34 s b h for a layer with GELU, LayerNorm and 16 bit,
    # without the attention scores: of these, 11 are attention (with 1 for a dropout mask), 19 the MLP (1 for a mask),
    # 4 the LayerNorms. SDPA also keeps its statistics, and no dropout is used here.
    config = small("starcoder2", num_key_value_heads=4, intermediate_size=256)
    layer = ActivationModel(config, PLAIN).decoder_layer()
    ours = layer.saved / (BATCH * LENGTH * 64)
    masks, statistics, norm_statistics = 2, 4 * 4 / 64, 2 * 2 * 2 / 64
    assert ours - statistics - norm_statistics == pytest.approx(34 - masks)
