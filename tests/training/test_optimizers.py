"""Optimizers beside AdamW and SGD equal a plain process's, with groups that are and are not decayed."""

import pytest

from launcher.run_directory import read_json_lines
from tests.support.equality import STEPS, Equality, RanksOf

pytestmark = pytest.mark.matrix

MUON = ("optimizer.type=muon", "learning_rate=0.01", "adam_learning_rate=0.003")


@pytest.mark.distributed
def test_adafactor(ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), "zero.stage=0", "optimizer.type=adafactor", "learning_rate=0.01")


LION = ("optimizer.type=lion", "learning_rate=0.001", "adam_beta2=0.99")
SIGNS = {"loss": 2e-5, "norm": 5e-5}
"""Where a momentum is near zero, another order of a sum turns its sign, and with it a whole step of that weight."""
LION_LAYOUTS = {
    "zero 2": (2, ("zero.stage=2",)),
    "zero 0": (2, ("zero.stage=0",)),
    "zero 1": (2, ("zero.stage=1",)),
    "zero 3": (2, ("zero.stage=3",)),
    "offload": (2, ("zero.stage=2", "zero.offload_optimizer=cpu")),
    "tensor": (1, ("zero.stage=1", "tensor_parallel_size=2")),
    "sequence": (1, ("zero.stage=3", "sequence_parallel_size=2")),
    "pipeline": (1, ("zero.stage=1", "pipeline_parallel_size=2")),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LION_LAYOUTS)
def test_lion(layout: str, ranks_of: RanksOf, equality: Equality) -> None:
    data_parallel, settings = LION_LAYOUTS[layout]
    equality.check(ranks_of(2), *LION, *settings, data_parallel=data_parallel, **SIGNS)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 0, 1, 3])
def test_lion_in_bf16(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    """Its direction is a sign, which a rounding turns where a gradient is near zero."""
    equality.check(ranks_of(2), *LION, f"zero.stage={stage}", "precision=bf16", loss=3e-2, norm=1e-1)


@pytest.mark.distributed
def test_muon_with_clipping(ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), "zero.stage=0", *MUON)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 1])
def test_muon_whose_weights_are_flattened(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    """It stops in the middle too, and goes on with the momentum that it saved."""
    ranks, model = ranks_of(2), equality.model()
    settings = (*MUON, "max_grad_norm=0", f"zero.stage={stage}", "save_steps=10")
    directory, plan, _ = equality.run(ranks, model, *settings, stop_after=9)
    data, plain = equality.reference(model, plan)
    ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=2e-6, rel=0)
    assert {record["grad_norm"] for record in records} == {None}
