from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.planning.activations import ActivationSettings
from launcher.planning.families import list_parameters
from launcher.planning.layout import Layout, Resources
from launcher.planning.memory import StateSettings
from launcher.planning.plan import make_plan
from launcher.planning.rank_memory import BufferSettings, RankMemory, in_flight, rank_memory
from launcher.recipe.schema import Recipe
from tests.support.small_models import small

CONFIG = small("llama", num_hidden_layers=8)
PARAMETERS = list_parameters(CONFIG)
NONE = BufferSettings(reduce_bucket_size=1000)


def layout(data: int = 1, **sizes: int) -> Layout:
    sizes = {f"{name}_parallel_size": size for name, size in sizes.items()}
    world = data
    for name, size in sizes.items():
        world *= 1 if name.startswith("expert") else size
    return Layout(world_size=world, data_parallel_size=data, **sizes)


def ranks(
    where: Layout,
    stage: int = 1,
    micro_batches: int = 1,
    buffers: BufferSettings = NONE,
    config: dict[str, Any] = CONFIG,
    **changes: Any,
) -> list[RankMemory]:
    activations = ActivationSettings(
        "bf16", 2, 32,
        tensor_parallel_size=where.tensor_parallel_size,
        sequence_parallel_size=where.sequence_parallel_size,
    )  # fmt: skip
    states = StateSettings(
        stage, "bf16", where.data_parallel_size * where.sequence_parallel_size, micro_batches, **changes
    )
    return rank_memory(config, list_parameters(config), where, states, activations, buffers)


def test_earlier_stages_hold_more_micro_batches() -> None:
    # 1F1B: stage s of p has p - s micro batches in flight (arXiv 2104.04473, section 2.2.1).
    assert [in_flight(stage, 4, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(stage, 4, 2) for stage in range(4)] == [2, 2, 2, 1]
    even = small("llama", num_hidden_layers=8, vocab_size=32)  # so that each stage has two layers
    stages = ranks(layout(pipeline=4), micro_batches=16, config=even)
    assert [rank.num_layers for rank in stages] == [2, 2, 2, 2]
    per_batch = [rank.activations / (4 - rank.stage) for rank in stages[:3]]
    assert per_batch == pytest.approx([per_batch[0]] * 3, rel=0.1)
    assert stages[0].activations > stages[1].activations > stages[2].activations
    assert [rank.loss > 0 for rank in stages] == [False, False, False, True]


def test_stages_hold_the_models_activations_between_them() -> None:
    (whole,) = ranks(layout())
    parts = ranks(layout(pipeline=4))
    batch = 2 * 32 * (3 * 8 + 2 * 2 * 16)  # ids, labels, positions, and the rotary tables, which every stage has
    borders = 4 * 2 * (2 * 32 * 2 * 64)  # input and output of each stage
    assert sum(rank.activations for rank in parts) == whole.activations + 3 * batch + borders
    assert sum(rank.num_parameters for rank in parts) == whole.num_parameters


@pytest.mark.parametrize("kind", ["tensor", "sequence", "pipeline"])
def test_more_ranks_never_hold_more(kind: str) -> None:
    before = None
    for size in (1, 2, 4):
        fullest = max(rank.device_bytes - rank.overhead for rank in ranks(layout(**{kind: size}), stage=1))
        assert before is None or fullest <= before
        before = fullest


def test_sequence_parallel_ranks_divide_the_states_as_data_parallel_ones_do() -> None:
    (by_data,), (by_sequence,) = ranks(layout(data=4), stage=3), ranks(layout(sequence=4), stage=3)
    assert by_data.states == by_sequence.states
    assert by_sequence.activations * 4 == pytest.approx(by_data.activations, rel=1e-3)


def test_experts_have_fewer_replicas_to_share_their_optimizer_states() -> None:
    config = small("mixtral")
    (alone,), (shared,) = (
        ranks(layout(data=4), config=config),
        ranks(layout(data=4, expert=4), config=config),
    )
    experts = sum(tensor.numel for tensor in list_parameters(config) if tensor.role == "expert")
    # Weights: a quarter of the experts. Optimizer: the same share either way, 1/4 of all = all of a quarter.
    assert alone.states.parameters - shared.states.parameters == pytest.approx(2 * experts * 3 / 4, rel=1e-3)
    assert shared.states.optimizer == pytest.approx(alone.states.optimizer, rel=1e-3)


def test_frozen_weights_have_neither_gradients_nor_optimizer_states() -> None:
    trained = [*PARAMETERS[:1], *(tensor for tensor in PARAMETERS if tensor.name.endswith("input_layernorm.weight"))]
    frozen = frozenset(tensor.name for tensor in PARAMETERS) - {tensor.name for tensor in trained}
    activations = ActivationSettings("bf16", 2, 32)
    for stage, whole in ((2, 1), (3, 4)):
        states = StateSettings(stage, "bf16", 4, persistence_threshold=0)
        where = layout(data=4)
        (alone,) = rank_memory(CONFIG, PARAMETERS, where, states, activations, NONE)
        (small_part,) = rank_memory(CONFIG, PARAMETERS, where, states, activations, NONE, frozen)
        assert small_part.states.optimizer < alone.states.optimizer / 2
        weights = sum(-(-tensor.numel // whole) for tensor in PARAMETERS) * 2
        assert weights <= small_part.states.parameters < 1.6 * weights


def test_buffers_are_deepspeeds_buckets() -> None:
    buffers = BufferSettings(reduce_bucket_size=10_000, overlap_comm=True)
    by_stage = {stage: ranks(layout(data=4), stage, buffers=buffers)[0] for stage in range(4)}
    assert by_stage[0].buffers == 0
    assert by_stage[1].buffers == by_stage[2].buffers == 2 * 2 * 10_000
    live = by_stage[3].num_parameters * 2
    assert by_stage[3].buffers == live + 2 * 10_000
    few = replace(buffers, max_live_parameters=5_000, prefetch_bucket_size=1_000)
    assert ranks(layout(data=4), 3, buffers=few)[0].buffers == 2 * (6_000 + 10_000)


def test_the_step_casts_a_partition_of_the_gradients() -> None:
    (rank,) = ranks(layout(data=4), 2)
    assert rank.step_buffers == -(-rank.num_parameters // 4) * (2 + 4)
    (offloaded,) = ranks(layout(data=4), 2, offload_optimizer=True)
    assert offloaded.step_buffers == 0
    (sub_groups,) = ranks(layout(data=4), 3, buffers=replace(NONE, sub_group_size=100))
    assert sub_groups.step_buffers == 4 * 100 + 2 * 1000
    assert rank.device_bytes == max(rank.backward_bytes, rank.step_bytes)


def test_cuda_takes_its_share_and_a_cpu_does_not(make_recipe: Callable[..., Recipe]) -> None:
    on_cpu = make_plan(make_recipe({}), Resources(workers_per_node=2))
    on_gpu = make_plan(make_recipe({}), Resources(workers_per_node=2, device="cuda"))
    assert on_cpu.ranks is not None
    assert on_gpu.ranks is not None
    assert on_cpu.ranks[0].overhead == 0
    assert on_gpu.ranks[0].overhead > 2**29
    assert on_cpu.ranks[0].states == on_gpu.ranks[0].states == on_cpu.memory


def test_what_cannot_be_counted_is_left_out(make_recipe: Callable[..., Recipe]) -> None:
    uncounted = make_recipe({"deepspeed.overrides": {"zero_optimization": {"round_robin_gradients": True}}})
    plan = make_plan(uncounted, Resources())
    assert plan.ranks is None
