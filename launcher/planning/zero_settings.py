"""What of ZeRO's own settings goes with what: offload, and the second copies and short numbers of ZeRO++."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import Problem
from launcher.planning.layout import Layout, divisors

OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""What may lie outside of the device, and under which stages there is something to lie there."""

QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
"""qwZ and qgZ of ZeRO++ (arXiv 2306.10209), whose kernels DeepSpeed has for GPUs only."""


def zero_problems(zero: Mapping[str, Any], layout: Layout) -> list[Problem]:
    """Say what of a resolved `zero_optimization` no test of ours has trained with; empty when all is well."""
    stage: int = zero["stage"]
    return [*_offload_problems(zero, stage), *_hpz_problems(zero, stage, layout), *_quantized_problems(zero)]


def parameter_device_problems(device: str | None) -> list[Problem]:
    """Say why parameters cannot be offloaded to a device; empty when they can."""
    if device != "nvme":
        return []
    message = (
        "is nvme, from where no test of ours has trained: DeepSpeed fetches such parameters ahead into a fixed number "
        "of buffers (runtime/swap_tensor/partitioned_param_swapper.py); set it to cpu"
    )
    return [Problem(message, "zero.offload_param")]


def ratio_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Say why a resolved configuration cannot offload a part of the optimizer's states; empty when it can, or need not.

    `runtime/zero/stage3.py: DeepSpeedZeroOptimizer_Stage3.__init__` ends with an assertion.
    """
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    ratio = offload.get("ratio", 1.0)
    of_torch = config["optimizer"].get("params", {}).get("torch_adam", False)
    if offload.get("device") != "cpu" or ratio >= 1 or not of_torch:
        return []
    message = (
        f"zero_optimization.offload_optimizer.ratio is {ratio}, and a part of the states is left on the device by "
        "DeepSpeed's own Adam for hosts alone: set optimizer.params.torch_adam to false, or leave the ratio out"
    )
    return [Problem(message, "deepspeed")]


def _offload_problems(zero: Mapping[str, Any], stage: int) -> list[Problem]:
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in OFFLOADS}
    problems = parameter_device_problems(devices["offload_param"])
    for name, stages in OFFLOADS.items():
        if devices[name] != "none" and stage not in stages:
            wanted = "1, 2 or 3" if len(stages) > 1 else "3"
            message = (
                f"is {devices[name]}, but ZeRO stage {stage} has nothing to offload there; set zero.stage to {wanted}"
            )
            problems.append(Problem(message, f"zero.{name}"))
    if devices["offload_optimizer"] == "nvme" and stage in (1, 2):
        message = (
            f"is nvme, but ZeRO stage {stage} keeps what is offloaded in host memory all the same "
            "(runtime/zero/stage_1_and_2.py: cpu_offload); set zero.stage to 3, or it to cpu"
        )
        problems.append(Problem(message, "zero.offload_optimizer"))
    return problems


def _hpz_problems(zero: Mapping[str, Any], stage: int, layout: Layout) -> list[Problem]:
    size: int = zero.get("zero_hpz_partition_size", 1)
    if size <= 1:
        return []
    messages = []
    if stage != 3:
        messages.append(f"is {size}, but ZeRO stage {stage} keeps whole weights anyway; set zero.stage to 3")
    if layout.data_parallel_size < layout.world_size or layout.expert_parallel_size > 1:
        messages.append("is trained by our tests in data parallel runs only; leave parallel out")
    elif layout.data_parallel_size % size:
        fits = ", ".join(str(each) for each in divisors(layout.data_parallel_size) if each > 1)
        messages.append(f"is {size}, which does not divide {layout.data_parallel_size} workers; sizes that do: {fits}")
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        messages.append("goes with no offload_param in a test of ours; leave one of them out")
    return [Problem(message, "zero.hpz_partition_size") for message in messages]


def _quantized_problems(zero: Mapping[str, Any]) -> list[Problem]:
    reason = "quantises on GPUs only (op_builder/quantizer.py), where no test of ours has run it; remove it"
    return [
        Problem(f"zero_optimization.{name} {reason}", "deepspeed")
        for name in QUANTIZED
        if zero.get(name) not in (None, False)
    ]
