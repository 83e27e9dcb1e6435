"""Faults of the pinned DeepSpeed 0.19.8 and torch that we correct, all of them here, with their place in the source."""

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch.nn.utils import get_total_norm

from launcher.planning.layout import Layout


def quiet_known_warnings() -> None:
    """Hide torch's deprecation warnings of collectives that DeepSpeed calls; nothing a user could change."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def disable_cpu_shared_memory_op() -> None:
    """Keep DeepSpeed from building and loading its shared-memory all-reduce on CPU.

    `deepspeed/comm/torch.py: build_shm_op` compiles it at the first `init_distributed` (30 s), takes a file lock at
    every later start that a killed process leaves behind for ever, and leaves a 66 MiB file a rank in /dev/shm
    (`csrc/cpu/comm/shm.cpp`). Only `inference_all_reduce` uses it, training never does.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_collective_timeout(seconds: float) -> None:
    """Make every process group, DeepSpeed's own ones too, give up after `seconds`.

    DeepSpeed makes its groups with `new_group` and without a time-out, so `init_distributed(timeout=...)` does not
    reach them; torch's default of 30 minutes does. The default is therefore what must change, before any group is made.
    """
    c10d.default_pg_timeout = datetime.timedelta(seconds=seconds)


def avoid_compiler_import() -> None:
    """Skip inductor's import (2 s a rank) at `deepspeed.initialize` on CPU.

    `deepspeed/runtime/zero/muon/original_muon.py` decorates a function with `torch.compile` at import. The switch
    must be
    set before torch is imported, and turns off `torch.compile` for the process, so it is for runs that do not compile.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def set_training(engine: Any, training: bool) -> None:
    """Turn the engine and its model to training, or to evaluation.

    `runtime/engine.py: train` and `eval` turn the model alone, so that `engine.training` stays true for ever.
    """
    torch.nn.Module.train(engine, training)


def averaging_ranks(layout: Layout, zero_stage: int) -> int:
    """By how many ranks DeepSpeed divides the sum of all ranks' gradients.

    It means to divide by the data-parallel size. Under sequence parallelism stages 0 to 2 do (`runtime/engine.py:
    allreduce_bucket` and `runtime/zero/stage_1_and_2.py` divide by `world size / sequence_parallel_size`); stage 3
    divides by all ranks of both kinds.
    """
    if zero_stage == 3:
        return layout.data_parallel_size * layout.sequence_parallel_size
    return layout.data_parallel_size


def leave_out_frozen_aliases(engine: Any) -> None:
    """Let `save_checkpoint(exclude_frozen_parameters=True)` leave out frozen weights under all of their names.

    DeepSpeed (`runtime/engine.py: module_state_dict`) walks `named_parameters()`, which tells a shared weight's first
    name only: the embeddings that peft's prompt methods hold a second time stayed in every checkpoint.
    """
    original = engine.module_state_dict

    def module_state_dict(*args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> Any:
        state = original(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)
        if exclude_frozen_parameters:
            for name, parameter in engine.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    engine.module_state_dict = module_state_dict


def forget_the_dummy_step(engine: Any) -> None:
    """Undo the optimizer step that DeepSpeed makes while it is built, under ZeRO 0 in 16 bit.

    `runtime/fp16/unfused_optimizer.py: initialize_optimizer_states` steps with zero gradients, to have the states
    allocated: weights are decayed once, and Adam's bias correction begins at its second step, which put losses off by
    2.5e-2.
    """
    engine.optimizer.refresh_fp32_params()
    engine.optimizer.optimizer.state.clear()


def mend_the_loss_scale(engine: Any, zero_stage: int) -> None:
    """Multiply fp16's losses by the scale that their gradients are divided by, and let it grow between two steps.

    `step` first doubles the scale (`_update_scale`) and then divides the gradients by it (`unscale_and_clip_grads`), so
    that gradients too small to be clipped were halved in that step, under every stage, and the norm that stage 3 tells
    (`runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`, `runtime/fp16/unfused_optimizer.py`; known from
    https://github.com/deepspeedai/DeepSpeed/pull/8588). Stage 0 never scales the loss (`runtime/engine.py: backward`
    asks ZeRO's optimizers only) and divides all the same: by 65,536 at the start.
    """
    optimizer = engine.optimizer
    step, update, backward = optimizer.step, optimizer._update_scale, engine.backward
    held: list[bool] = []

    def hold(overflow: bool) -> None:
        if overflow:
            update(overflow)
        else:
            held.append(overflow)

    def step_then_grow(*args: Any, **kwargs: Any) -> None:
        scale = optimizer.loss_scale
        step(*args, **kwargs)
        if zero_stage == 0 and not optimizer.overflow:
            optimizer._global_grad_norm /= scale
        while held:
            update(held.pop())

    optimizer._update_scale = hold
    optimizer.step = step_then_grow
    if zero_stage == 0:
        engine.backward = lambda loss, **kwargs: backward(loss * optimizer.loss_scale, **kwargs)


def step_and_norm(engine: Any, zero_stage: int, precision: str, optimizer: str) -> float | None:
    """Make the engine's optimizer step and return the global gradient norm before clipping.

    Under ZeRO 1 and 2 Muon's directions are in the place of the gradients before the norm is taken
    (`runtime/zero/stage_1_and_2.py: get_flat_partition`), so none is known.

    Under ZeRO 0 in fp32 `engine.get_global_grad_norm()` is None (`runtime/engine.py: _take_model_step` drops what
    `clip_grad_norm_` returns), so the norm is taken here, from the averaged gradients that the step is about to use.
    """
    norm: float | None = None
    if zero_stage == 0 and precision == "fp32":
        norm = _gradient_norm(engine)
    engine.step()
    if optimizer == "muon" and zero_stage > 0:
        return None
    if norm is None:
        known = engine.get_global_grad_norm()
        norm = None if known is None else float(known)
    return norm


def _gradient_norm(engine: Any) -> float:
    """The norm of whole gradients on every rank; of tensor-parallel ranks, each holds a part of the sharded ones."""
    whole: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            (parts if getattr(parameter, "tensor_model_parallel", False) else whole).append(parameter.grad)
    if not parts:
        return float(get_total_norm(whole))
    from deepspeed.utils import groups

    square = get_total_norm(parts).square()
    torch.distributed.all_reduce(square, group=groups.get_tensor_model_parallel_group())
    return float((square + get_total_norm(whole).square()).sqrt())


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device, asynchronously where the host memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def let_auto_ep_capture_outputs() -> None:
    """Give AutoEP the registry of outputs that it expects.

    transformers 5.23 keys it by model (`utils/output_capturing.py: _CanRecordRegistry`); AutoEP uses it as a plain
    dictionary by class name (`module_inject/auto_ep_presets/base.py: _retarget_transformers_output_recorders`) and ends
    with "get() takes 2 positional arguments but 3 were given".
    """
    from transformers.utils import output_capturing

    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    known = type(registry)
    if issubclass(known, _ByNameOrModel):
        return
    registry.__class__ = type("ByNameOrModel", (_ByNameOrModel, known), {})


def keep_no_input_of_frozen_matrices() -> None:
    """Let a frozen matrix keep nothing of its input for the backward pass under ZeRO 3, as PyTorch's own does.

    The first engine of stage 3 puts another function in the place of `torch.nn.functional.linear`, for the life of the
    process (`runtime/zero/partition_parameters.py: _enable_mem_efficient_linear`). That one keeps its input even where
    no gradient of the matrix is made (`runtime/zero/linear.py: setup_context`): under LoRA, a tenth or more of all
    activations.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    linear: Any = LinearFunctionForZeroStage3
    original = linear.setup_context
    if getattr(original, "keeps_no_input", False):
        return

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        original(ctx, inputs, output)
        _, weight, bias = inputs
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, weight, bias)

    setup_context.keeps_no_input = True  # type: ignore[attr-defined]
    linear.setup_context = staticmethod(setup_context)


def named_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give parameter groups the names by which experts are split off (`moe/utils.py`: a group without ends it)."""
    return [{**group, "name": f"group {index}"} for index, group in enumerate(groups)]


class _ByNameOrModel(dict[str, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        dict.__setitem__(self, _name(key), value)

    def get(self, key: Any, default: Any = None) -> Any:
        found = dict.get(self, _name(key), default)
        return {} if found is None and not isinstance(key, str) else found


def _name(key: Any) -> str:
    return key if isinstance(key, str) else str(key.__class__)


def leave_out_recovery_scripts(engine: Any) -> None:
    """Keep two scripts out of the checkpoints folder that `runtime/engine.py: _copy_recovery_script` puts there.

    `zerofleet export` does what they are for, and nobody verifies them.
    """
    engine._copy_recovery_script = lambda save_path: None


@contextmanager
def loading_only_data() -> Iterator[None]:
    """Let `torch.load` make the few classes that DeepSpeed puts into its checkpoints, and run no other code.

    DeepSpeed reads its files with `weights_only=False`, which runs whatever a file says
    (`runtime/checkpoint_engine/torch_checkpoint_engine.py: load`, `checkpoint/universal_checkpoint.py`).
    """
    # Not torch's `safe_globals` block: within another one, its end would forbid the classes to the outer one too.
    torch.serialization.add_safe_globals(_checkpoint_classes())
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


@contextmanager
def loading_universal(engine: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[None]:
    """Let `engine.load_checkpoint` read the universal form, as data only and through the memory map.

    DeepSpeed reads the form with `torch.load` itself, every file whole on every rank
    (`runtime/zero/stage3.py: load_hp_checkpoint_state_from_checkpoint_dir_stage3`); mapped, a rank reads its part. It
    looks for parameters under the engine's names, which in a pipeline count its layers (`optimizer.param_names`), and
    asks sequence parallelism's groups for tensor-parallel ones, which they do not know
    (`runtime/base_optimizer.py: load_hp_checkpoint_state_from_checkpoint_dir`).

    Args:
        engine: to load into.
        names: under which the form has each parameter of this rank.
    """
    from torch.utils.serialization import config

    engine._config.load_universal_checkpoint = True
    mapped, config.load.mmap = config.load.mmap, True
    optimizer = engine.optimizer
    own_names, optimizer.param_names = optimizer.param_names, names
    mpu = getattr(optimizer, "mpu", None)  # stage 3 keeps none
    if mpu is not None and not hasattr(mpu, "get_tensor_model_parallel_world_size"):
        optimizer.mpu = None
    try:
        with loading_only_data():
            yield
    finally:
        engine._config.load_universal_checkpoint = False
        config.load.mmap = mapped
        optimizer.param_names = own_names
        if mpu is not None:
            optimizer.mpu = mpu


def mend_optimizer_after_universal_load(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Set right what the universal load of the pinned DeepSpeed leaves wrong in PyTorch's optimizer.

    ZeRO 3 gives every group the options of the first one, so that biases and norms would be decayed, and gives all flat
    tensors one and the same step counter, which PyTorch's fused Adam then raises once for each of them
    (`runtime/zero/stage3.py: load_hp_checkpoint_state_from_checkpoint_dir_stage3`). All stages leave the counter on the
    device that wrote it.

    Args:
        optimizer: inside DeepSpeed's.
        groups: the options that were saved, by group.
    """
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone().to(parameter.device)


def _checkpoint_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
