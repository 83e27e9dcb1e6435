"""The throughput model against published figures, and against what must hold whatever its constants are."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planning.accelerators import NETWORKS, find_accelerator
from launcher.planning.calibration import INSIDE_EFFICIENCY, OUTSIDE_EFFICIENCY, SOFTWARE
from launcher.planning.collectives import Fabric
from launcher.planning.layout import Layout
from launcher.planning.model_shape import model_shape
from launcher.planning.published import by_source, read_rows
from launcher.planning.throughput import step_time
from launcher.planning.work import Machine, StepTime, Work

ROOT = Path(__file__).resolve().parents[2]
ROWS = read_rows()
HELD_OUT = [row for row in ROWS if not row.fitted]
H100 = find_accelerator("H100-80GB")


def test_at_most_a_third_of_the_published_rows_is_fitted_on() -> None:
    assert len(ROWS) >= 33
    assert 0 < len(ROWS) - len(HELD_OUT) <= len(ROWS) / 3


def test_the_rows_that_were_not_fitted_are_predicted() -> None:
    assert fmean(abs(row.error) for row in HELD_OUT) <= 0.10
    published, predicted = (
        places([row.tokens_per_second for row in HELD_OUT]), places([row.predicted for row in HELD_OUT])
    )  # fmt: skip
    assert correlation(published, predicted) >= 0.9


def places(values: list[float]) -> list[float]:
    """Spearman's correlation is Pearson's of these; no two values are the same."""
    assert len(set(values)) == len(values)
    return [float(sorted(values).index(value)) for value in values]


def test_the_document_tells_the_error_of_each_source() -> None:
    table = re.findall(r"^\| (.+?) \| +(\d+) \| ([\d.]+) % \|$", (ROOT / "docs/planning.md").read_text(), re.MULTILINE)
    sources = [(source, rows) for source, rows in by_source(HELD_OUT)]
    written = {source: (int(rows), float(error)) for source, rows, error in table}
    assert set(written) == {source for source, _ in sources} | {"together"}
    for source, rows in [*sources, ("together", HELD_OUT)]:
        error = 100 * fmean(abs(row.error) for row in rows)
        assert written[source] == (len(rows), pytest.approx(error, abs=0.06)), source


def test_a_published_figure_of_an_unknown_device_or_model_is_named(tmp_path: Path) -> None:
    header, first, *_ = (ROOT / "launcher/planning/published_throughput.csv").read_text().splitlines()
    (tmp_path / "rows.csv").write_text("\n".join([header, first.replace("A100-80G", "TPU-v5"), first]) + "\n")
    with pytest.raises(PlanError, match=r"line 2  GPT-7.5B: KeyError: 'TPU'"):
        read_rows(tmp_path / "rows.csv")


LLAMA_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def layout(data: int = 8, **sizes: int) -> Layout:
    sizes = {f"{name}_parallel_size": size for name, size in sizes.items()}
    world = data
    for name, size in sizes.items():
        world *= 1 if name.startswith("expert") else size
    return Layout(world_size=world, data_parallel_size=data, **sizes)


def work(where: Layout | None = None, config: dict[str, Any] = LLAMA_8B, **changes: Any) -> Work:
    shape = model_shape(config)
    assert shape is not None
    basis = Work(
        shape=shape, gated=True, layout=where or layout(), sequence_length=4096, micro_batch_size=1, micro_batches=4,
        zero_stage=3, number_format="bf16",
    )  # fmt: skip
    return replace(basis, **changes)


def estimate(where: Layout | None = None, machine: Machine | None = None, **changes: Any) -> StepTime:
    return step_time(work(where, **changes), machine or Machine(H100))


def test_the_parts_of_a_step_add_up_to_it() -> None:
    step = estimate(layout(2, tensor=2, pipeline=2), zero_stage=1)
    assert step.seconds == pytest.approx(sum(step.parts().values()))
    assert all(seconds >= 0 for seconds in step.parts().values())
    assert step.tokens == 2 * 4 * 4096
    assert step.mfu == pytest.approx(step.flops / step.seconds / 8 / 989.4e12)


@pytest.mark.parametrize(
    "slower",
    [
        {"recomputation": 1.0},
        {"offload_optimizer": True},
        {"offload_optimizer": True, "offload_param": True},
        {"number_format": "fp32"},
        {"sequence_length": 8192},
    ],
    ids=str,
)
def test_what_costs_time_is_seen_to(slower: dict[str, Any]) -> None:
    assert estimate(**slower).tokens_per_second_per_device < estimate().tokens_per_second_per_device


def test_the_bubble_of_a_pipeline() -> None:
    # Narayanan et al. (arXiv 2104.04473, section 2.2): (p - 1) / m of the ideal time, and with v parts (p - 1) / (v m).
    shares = {}
    for parts in (1, 2):
        step = estimate(layout(1, pipeline=4), zero_stage=0, micro_batches=12, virtual_stages=parts)
        ideal = step.seconds - step.pipeline - step.optimizer
        shares[parts] = step.pipeline / ideal
    assert shares[1] == pytest.approx(3 / 12, abs=0.05)  # and the head, and sending, which the last stage has more of
    assert shares[2] == pytest.approx(shares[1] - 3 / 24, abs=0.01)


def test_more_micro_batches_hide_the_bubble_and_the_reduction() -> None:
    rates = [
        estimate(layout(8, pipeline=4), zero_stage=1, micro_batches=number).tokens_per_second_per_device
        for number in (1, 4, 16, 64)
    ]
    assert rates == sorted(rates)


def test_a_slow_network_slows_down_what_crosses_nodes() -> None:
    slow = Machine(H100, network=replace(H100.inter_node, bandwidth=H100.inter_node.bandwidth / 20))
    assert estimate(layout(8), slow) == estimate(layout(8))
    assert estimate(layout(64), slow).data > estimate(layout(64)).data
    assert estimate(layout(8, tensor=8), slow).tensor == estimate(layout(8, tensor=8)).tensor


def test_tensor_parallelism_across_nodes_is_dear() -> None:
    ethernet = Machine(H100, network=NETWORKS["Ethernet-25"])
    assert estimate(layout(4, tensor=16), ethernet).tensor > 5 * estimate(layout(8, tensor=8), ethernet).tensor


def test_stage_2_reduces_at_each_micro_batch_and_stage_1_once() -> None:
    by_stage = {stage: estimate(layout(16), zero_stage=stage, micro_batches=8).data for stage in (1, 2)}
    fabric = Machine(H100).fabric
    scatter = fabric.gather(2 * work().shape.num_parameters, 16, 1)
    assert by_stage[2] - by_stage[1] == pytest.approx(7 * scatter, rel=1e-6)


def test_a_collective_takes_what_its_slowest_link_takes() -> None:
    # nccl-tests (doc/PERFORMANCE.md): an all-reduce of S bytes over n ranks moves 2 S (n - 1) / n over each link.
    fabric = Machine(H100).fabric
    size = 8e9
    inside = fabric.reduce(size, 8, 1)
    assert inside == pytest.approx(2 * size * 7 / 8 / (450e9 * INSIDE_EFFICIENCY), rel=0.01)
    across = fabric.reduce(size, 16, 8)  # one rank of each node: one port carries all
    assert across == pytest.approx(2 * size * 15 / 16 / (50e9 * OUTSIDE_EFFICIENCY), rel=0.01)
    together = fabric.reduce(size, 128, 1)  # eight ranks of each node: eight ports carry it
    assert together == pytest.approx(across / 8, rel=0.05)
    assert fabric.exchange(size, 8, 1) == pytest.approx(size * 7 / 8 / (450e9 * INSIDE_EFFICIENCY), rel=0.01)
    assert fabric.reduce(size, 1, 1) == fabric.gather(size, 1, 1) == fabric.exchange(size, 1, 1) == 0


@pytest.mark.parametrize(("size", "stride", "near"), [(8, 1, 8), (16, 1, 8), (4, 8, 1), (4, 2, 4), (16, 4, 2)])
def test_ranks_go_node_by_node(size: int, stride: int, near: int) -> None:
    assert Fabric(H100.intra_node, H100.inter_node, 8).in_a_node(size, stride) == near


def test_experts_are_exchanged_and_only_the_chosen_ones_computed() -> None:
    mixtral = {
        **LLAMA_8B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    }  # fmt: skip
    more = {**mixtral, "num_local_experts": 16}
    assert estimate(config=more).matrices == pytest.approx(estimate(config=mixtral).matrices, rel=0.01)
    assert estimate(layout(8, expert=4), config=mixtral).tensor > estimate(config=mixtral).tensor == 0


def test_every_program_has_published_rows() -> None:
    assert {row.machine.software.name for row in ROWS} == set(SOFTWARE)
