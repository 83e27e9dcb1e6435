"""bf16 and fp16 stay within their rounding of a plain fp32 process, and CPU offload changes nothing.

bf16 has 8 significant bits, fp16 has 11: one rounding is off by up to 0.4 % and 0.05 %. Losses are near 5.
"""

import math
from pathlib import Path

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from launcher.checkpoints import folders
from launcher.run_directory import read_json_lines
from launcher.training.checkpoint_files import read_state
from tests.support.equality import MIXTURES, STEPS, Equality, RanksOf
from tests.support.ranks import Ranks

pytestmark = pytest.mark.matrix

BF16 = {"loss": 2e-2, "norm": 5e-2}
FP16 = {"loss": 2e-3, "norm": 1e-2}
SIXTEEN_BITS = {
    "zero 0": ("zero.stage=0",),
    "zero 1": ("zero.stage=1",),
    "zero 2": ("zero.stage=2",),
    "zero 3": ("zero.stage=3",),
    "tensor": ("tensor_parallel_size=2", "zero.stage=1"),
    "sequence": ("sequence_parallel_size=2", "zero.stage=2"),
    "pipeline": ("pipeline_parallel_size=2", "zero.stage=1"),
    "expert": ("expert_parallel_size=2", "zero.stage=1"),
    "expert zero 2": ("expert_parallel_size=2", "zero.stage=2"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", SIXTEEN_BITS)
def test_bf16(layout: str, ranks_of: RanksOf, equality: Equality) -> None:
    data_parallel = 2 if layout.startswith(("zero", "expert")) else 1
    model = equality.model("mixtral", **MIXTURES["mixtral"]) if layout.startswith("expert") else None
    settings = ("precision=bf16", *SIXTEEN_BITS[layout])
    equality.check(ranks_of(2), *settings, model=model, data_parallel=data_parallel, **BF16)


GROWING = "deepspeed.overrides={fp16: {initial_scale_power: 8, loss_scale_window: 5}}"
"""The scale of the losses doubles after 5, 10 and 15 steps."""


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_with_a_loss_scale_that_grows(
    stage: int, ranks_of: RanksOf, equality: Equality, fp16_on_any_cpu: None
) -> None:
    directory, _ = equality.check(ranks_of(2), "precision=fp16", f"zero.stage={stage}", GROWING, **FP16)
    assert _loss_scale(folders.complete(directory.checkpoints)[-1], stage) == 2.0**11


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [3, 0, 1, 2])
def test_fp16_whose_gradients_are_not_clipped(
    stage: int, ranks_of: RanksOf, equality: Equality, fp16_on_any_cpu: None
) -> None:
    """Clipping, and Adam, would hide a gradient that is divided by another scale than it was multiplied by."""
    sgd = ("optimizer.type=sgd", "max_grad_norm=0", "learning_rate=0.1")
    equality.check(ranks_of(2), "precision=fp16", f"zero.stage={stage}", GROWING, *sgd, **FP16)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_halves_a_loss_scale_that_is_too_large_and_leaves_the_step_out(
    stage: int, ranks_of: RanksOf, equality: Equality, fp16_on_any_cpu: None
) -> None:
    huge = "deepspeed.overrides={fp16: {initial_scale_power: 24, hysteresis: 1, loss_scale_window: 1000}}"
    settings = ("precision=fp16", f"zero.stage={stage}", huge, "warmup_steps=0", "data.sequence_length=32")
    directory, plan, records = equality.run(ranks_of(2), equality.model(), *settings)
    norms = [record["grad_norm"] for record in records]
    left_out = sum(norm is None or not math.isfinite(norm) for norm in norms)
    assert 0 < left_out < STEPS - 5
    assert _loss_scale(folders.complete(directory.checkpoints)[-1], stage) == 2.0 ** (24 - left_out)
    plain = equality.reference(equality.model(), plan)[1]
    # The weights were still the first ones when the first step that counts was made.
    assert records[0]["loss"] == pytest.approx(plain.losses[0], abs=FP16["loss"])
    assert records[-1]["loss"] < records[0]["loss"] - 0.3


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3, 1, 2])
def test_fp16_goes_on_with_the_loss_scale_that_it_saved(
    stage: int, ranks_of: RanksOf, equality: Equality, fp16_on_any_cpu: None
) -> None:
    ranks, model = ranks_of(2), equality.model()
    settings = ("precision=fp16", f"zero.stage={stage}", GROWING, "save_steps=10")
    directory, plan, _ = equality.run(ranks, model, *settings, stop_after=9)
    data, plain = equality.reference(model, plan)
    ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(plain.losses, abs=FP16["loss"], rel=0)
    assert _loss_scale(folders.complete(directory.checkpoints)[-1], stage) == 2.0**11


@pytest.mark.distributed
def test_16_bits_are_refused_where_the_processor_does_not_compute_in_them(one_rank: Ranks) -> None:
    for precision in ("fp16", "bf16"):
        (refused,) = one_rank.call("cases:refusal_of_precision", precision=precision, supported=False)
        start = (
            f"recipe: 1 problem\n  training.precision: this processor does not compute in {precision}; set it to fp32"
        )
        assert refused.startswith(start)
        assert one_rank.call("cases:refusal_of_precision", precision=precision, supported=True) == [None]


def _loss_scale(checkpoint: Path, stage: int) -> float:
    if stage == 0:
        return float(read_state(checkpoint / "mp_rank_00_model_states.pt")["optimizer"]["cur_scale"])
    state = read_state(next(checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")))["optimizer_state_dict"]
    scaler = state["loss_scaler"]
    assert isinstance(scaler, DynamicLossScaler)
    return float(scaler.cur_scale)


OFFLOADS = {
    "zero 1 optimizer": ("zero.stage=1", "zero.offload_optimizer=cpu"),
    "zero 2 optimizer": ("zero.stage=2", "zero.offload_optimizer=cpu"),
    "zero 3 optimizer": ("zero.stage=3", "zero.offload_optimizer=cpu"),
    "zero 3 both": ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"),
    "zero 2 pinned": (
        "zero.stage=2",
        "zero.offload_optimizer=cpu",
        "deepspeed.overrides={zero_optimization: {offload_optimizer: {pin_memory: true}}}",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_to_the_host_changes_nothing(offload: str, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), *OFFLOADS[offload])


COMPILED = {
    "zero 1": ("zero.stage=1", "{}"),
    "zero 2": ("zero.stage=2", "{}"),
    "zero 3": ("zero.stage=3", "{}"),
    "zero 3 in part": ("zero.stage=3", "{offload_optimizer: {ratio: 0.5}}"),
}


@pytest.mark.nvme
@pytest.mark.timeout(1200)  # the first time in a TORCH_EXTENSIONS_DIR
@pytest.mark.distributed
@pytest.mark.parametrize("layout", COMPILED)
def test_deepspeeds_own_adam_for_hosts(layout: str, ranks_of: RanksOf, equality: Equality) -> None:
    """Its vectors sum in another order than PyTorch's, and its divisions are reciprocals."""
    stage, zero = COMPILED[layout]
    compiled = f"deepspeed.overrides={{optimizer: {{params: {{torch_adam: false}}}}, zero_optimization: {zero}}}"
    equality.check(ranks_of(2), stage, "zero.offload_optimizer=cpu", compiled, loss=1e-5, norm=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 1])
def test_gradients_of_micro_batches_are_summed_in_fp32(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    summed = "deepspeed.overrides={data_types: {grad_accum_dtype: fp32}}"
    equality.check(ranks_of(2), "precision=bf16", f"zero.stage={stage}", summed, **BF16)
