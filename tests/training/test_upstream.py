"""Faults of the pinned DeepSpeed and transformers that we work around: each test fails when one is mended, or moves.

What `launcher/training/upstream.py` does about it, or a refusal in `launcher/planning`, can then go. The scale of
sequence-parallel gradients is watched by `test_layouts_sequence.py`, under SGD.
"""

import inspect

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import TorchBackend, build_shm_op
from deepspeed.ops.op_builder import quantizer
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from deepspeed.runtime import utils
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from deepspeed.runtime.zero import linear
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer, Init, InsertPostInitMethodToModuleSubClasses
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers.utils import output_capturing

from launcher.training.upstream import _ByNameOrModel, disable_cpu_shared_memory_op, keep_no_input_of_frozen_matrices


def test_these_are_faults_of_this_version() -> None:
    assert deepspeed.__version__.startswith("0.19.8")


def test_gradients_are_clipped_unless_the_config_says_no() -> None:
    assert GRADIENT_CLIPPING_DEFAULT == 1.0


def test_its_warm_up_begins_with_two_steps_of_no_learning_rate() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=10, warmup_type="linear")
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:2] == [0.0, 0.0]
    assert rates[2] > 0


def test_the_loss_scale_grows_before_gradients_are_divided_by_it() -> None:
    """What `mend_the_loss_scale` is for (https://github.com/deepspeedai/DeepSpeed/pull/8588)."""
    updates = {
        FP16_UnfusedOptimizer: "self._update_scale(",
        DeepSpeedZeroOptimizer: "self._update_scale(",
        DeepSpeedZeroOptimizer_Stage3: "self._loss_scale_update_and_overflow_cleanup()",
    }
    for kind, update in updates.items():
        step = inspect.getsource(kind).partition("    def step(self, closure=None)")[2]  # some are wrapped
        assert 0 < step.index(update) < step.index("self.unscale_and_clip_grads("), kind


def test_stage_0_does_not_scale_the_loss() -> None:
    source = inspect.getsource(deepspeed.DeepSpeedEngine).partition("    def backward(self, loss")[2]
    asked = source.index("if isinstance(self.optimizer, ZeROOptimizer):")
    assert asked < source.index("self.optimizer.scale_if_loss(loss)") < source.index("loss.backward(**")
    assert not issubclass(FP16_UnfusedOptimizer, ZeROOptimizer)


def test_stage_0_in_16_bit_steps_before_the_first_step() -> None:
    """What `forget_the_dummy_step` is for."""
    assert "self.optimizer.step()" in inspect.getsource(FP16_UnfusedOptimizer.initialize_optimizer_states)


def test_a_pipeline_refuses_stages_2_and_3() -> None:
    assert "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism" in inspect.getsource(PipelineEngine)


def test_a_pipelines_norm_under_stage_0_leaves_out_other_ranks_parameters() -> None:
    source = inspect.getsource(utils.clip_grad_norm_)
    assert "if (mpu.get_model_parallel_rank() == 0) or is_model_parallel_parameter(p)" in source


def test_a_universal_load_looks_for_the_engines_names_and_for_tensor_parallel_groups() -> None:
    """Those of a pipeline are not the whole model's, and sequence parallelism's groups do not answer."""
    source = inspect.getsource(ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir)
    assert "self.param_names[lp]" in source
    assert "else self.mpu.get_tensor_model_parallel_world_size()" in source
    assert not hasattr(parallel_state_sp, "get_tensor_model_parallel_world_size")


def test_auto_ep_asks_the_registry_in_a_way_that_transformers_does_not_know() -> None:
    recorded = output_capturing._CanRecordRegistry()
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        recorded.get("LlamaModel", None)


def test_process_groups_are_made_without_a_time_out() -> None:
    """What `set_collective_timeout` is for."""
    assert "return torch.distributed.new_group(ranks)" in inspect.getsource(TorchBackend.new_group)


def test_an_operation_over_shared_memory_is_built_unless_it_is_called_incompatible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `disable_cpu_shared_memory_op` is for."""
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in inspect.getsource(build_shm_op)
    assert "builder.load()" in inspect.getsource(build_shm_op)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, ShareMemCommBuilder.NAME, True)
    disable_cpu_shared_memory_op()
    assert build_shm_op() is None


def test_tensor_parallel_ranks_count_in_its_batch_size() -> None:
    """Why a plan sets the micro batch and the accumulation, and never `train_batch_size`."""
    source = inspect.getsource(DeepSpeedConfig.__init__)
    assert "self.world_size = dist.get_world_size()\n" in source
    assert "tensor_parallel" not in source


def test_a_16_bit_model_is_gathered_under_stage_3_alone() -> None:
    """Why an export joins the parts of tensor-parallel ranks from a checkpoint, and never asks the engine."""
    below = inspect.getsource(DeepSpeedEngine.save_16bit_model).partition("        else:\n            state_dict = ")[2]
    assert below.startswith("self.module_state_dict(")
    assert "gather" not in inspect.getsource(DeepSpeedEngine.module_state_dict)


def test_a_scalar_among_the_parameters_cannot_be_sent_to_the_other_ranks() -> None:
    """Why `tasks/image_text_contrastive.py` makes vectors of them."""
    for place in (DeepSpeedEngine._broadcast_model, Init._zero_init_param):
        assert ".data.view(torch.uint8)" in inspect.getsource(place)
    with pytest.raises(RuntimeError, match=r"dim\(\) cannot be 0 to view Float as Byte"):
        torch.zeros(()).view(torch.uint8)


def test_stage_3_keeps_the_input_of_a_frozen_matrix() -> None:
    """What `keep_no_input_of_frozen_matrices` is for."""
    source = inspect.getsource(linear)
    assert "ctx.save_for_backward(input, weight, bias)" in source
    assert "torch.nn.functional.linear = zero3_linear_wrap" in inspect.getsource(InsertPostInitMethodToModuleSubClasses)


@pytest.mark.parametrize("frozen", [False, True])
def test_our_linear_keeps_an_input_for_a_gradient_alone(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = linear.LinearFunctionForZeroStage3
    monkeypatch.setattr(kind, "setup_context", vars(kind)["setup_context"])  # as it is now, again at the end
    keep_no_input_of_frozen_matrices()
    torch.manual_seed(1)
    given = torch.randn(2, 3, 5, requires_grad=True)
    weight, bias = torch.randn(4, 5, requires_grad=not frozen), torch.randn(4)
    gradients = []
    for function in (torch.nn.functional.linear, linear.zero3_linear_wrap):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved, kept=kept: kept.append(saved.data_ptr()), id):
            function(given, weight, bias)
        assert (given.data_ptr() in kept) is not frozen
        loss = function(given, weight, bias).square().sum()
        gradients.append(torch.autograd.grad(loss, (given,) if frozen else (given, weight)))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def test_our_registry_answers_both() -> None:
    kind = type("Registry", (_ByNameOrModel, output_capturing._CanRecordRegistry), {})
    recorded, model = kind(), torch.nn.Linear(1, 1)
    recorded[model] = {"hidden_states": 1}
    assert recorded.get(model) == recorded.get(str(model.__class__), None) == {"hidden_states": 1}
    assert recorded.get("unknown", None) is None
    assert recorded.get(torch.nn.ReLU()) == {}


def test_parameters_from_nvme_are_read_as_16_bit_whatever_they_are() -> None:
    """One reason why `planning/zero_settings.py` refuses them: fp32 ends in products of two types.

    The precedence of `or` and `if` drops the type that is asked for where a processor has no fp16. In bf16 a parameter
    that is fetched ahead meets its own buffer of before ("already assigned swap buffer id").
    """
    wrong = "self.dtype = dtype or torch.float16 if get_accelerator().is_fp16_supported("
    assert wrong in inspect.getsource(InsertPostInitMethodToModuleSubClasses._set_dtype)
    assert "AsyncPartitionedParameterSwapper(_ds_config, self.dtype)" in inspect.getsource(Init.__init__)
    buffers = inspect.getsource(AsyncPartitionedParameterSwapper._allocate_and_return_buffers_for_swap_in)
    assert "already assigned swap buffer id" in buffers


def test_quantised_communication_has_kernels_for_gpus_alone() -> None:
    """Why `planning/zero_settings.py` refuses qwZ and qgZ (ZeRO++): no test of ours can run them."""
    from deepspeed.accelerator import get_accelerator

    assert "QuantizerBuilder().load()" in inspect.getsource(CUDAQuantizer)
    assert issubclass(quantizer.QuantizerBuilder, CUDAOpBuilder)
    if get_accelerator().device_name() != "cpu":
        return
    with pytest.raises(ValueError, match="This op had not been implemented on CPU backend"):
        get_accelerator().create_op_builder("QuantizerBuilder").load()
