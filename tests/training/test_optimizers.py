"""Optimizers beside AdamW and SGD equal a plain process's, with groups that are and are not decayed."""

import pytest

from launcher.run_directory import read_json_lines
from tests.support.equality import STEPS, Equality, RanksOf

pytestmark = pytest.mark.matrix

MUON = ("optimizer.type=muon", "learning_rate=0.01", "adam_learning_rate=0.003")


@pytest.mark.distributed
def test_adafactor(ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), "zero.stage=0", "optimizer.type=adafactor", "learning_rate=0.01")


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
