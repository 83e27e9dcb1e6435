"""One rank of the measurement in test_memory.py: train each plan for a step and a half, and add up the live tensors.

    python model_states_worker.py PLANS RESULTS

PLANS is a JSON list of plans. RESULTS is a folder; this rank writes rank_N.json, one object a plan, into it.
"""

import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from launcher.planning.plan import Plan
from launcher.tasks import make_task
from launcher.training.distributed import join_process_group
from launcher.training.engine import build_engine
from launcher.training.passes import own_part
from launcher.training.swap_folder import open_swap_folder
from tests.support.live_storages import LiveStorages

Storages = dict[int, int]


def storages(tensors: Iterable[Any]) -> Storages:
    """Bytes by address, so that views of one buffer count once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def all_live() -> Storages:
    gc.collect()
    return storages(thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))


def weights(engine: Any, task: Any) -> Storages:
    zero = engine.optimizer
    parameters = list(engine.module.parameters())
    reference = getattr(task, "_copy", None)
    if reference is not None:
        parameters += reference.parameters()
    distillation = getattr(task, "distillation", None)
    if distillation is not None and distillation.teacher is not None:
        parameters += distillation.teacher.model.parameters()
    tensors = [parameter.data for parameter in parameters]
    tensors += [parameter.ds_tensor.data for parameter in parameters if hasattr(parameter, "ds_tensor")]
    for name in ("fp16_partitioned_groups_flat", "param_groups_fp16_flat_cpu_memory"):
        tensors += getattr(zero, name, [])
    tensors += getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    return storages(tensors)


def master_weights(engine: Any) -> list[torch.Tensor]:
    zero = engine.optimizer
    groups = [group["params"] for group in getattr(zero, "optimizer", zero).param_groups]
    groups += getattr(zero, "fp32_groups", [])
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [tensor for group in groups for tensor in group] + [t for name in names for t in getattr(zero, name, [])]


def gradients(engine: Any, task: Any) -> Storages:
    zero = engine.optimizer
    tensors = [parameter.grad for parameter in engine.module.parameters()]
    tensors += [tensor.grad for tensor in master_weights(engine)]
    for name in ("all_grad_tensors", "averaged_gradients"):
        for group in getattr(zero, name, {}).values():
            tensors += group or []
    tensors += getattr(zero, "accumulated_grads_in_cpu", {}).values()
    swapper = getattr(zero, "optimizer_swapper", None)
    for swapped in [] if swapper is None else swapper.swap_params_info.values():
        tensors += swapped.unswapped_gradients.values()
    tensors.append(getattr(zero, "grad_partitions_flat_buffer", None))
    return storages(tensors)


def optimizer_states(engine: Any, task: Any) -> Storages:
    zero = engine.optimizer
    states = getattr(zero, "optimizer", zero).state.values()
    moments = [value for state in states for value in state.values()]
    swapper = getattr(zero, "optimizer_swapper", None)
    buffers = [] if swapper is None else swapper.swap_buffer_manager.all_buffers
    return storages([*(tensor.data for tensor in master_weights(engine)), *moments, *buffers])


def measure(engine: Any, task: Any, before: Storages) -> dict[str, int]:
    """Bytes of each kind; `other` is what none of them explains."""
    seen: Storages = dict(before)
    result = {}
    kinds = {"parameters": weights, "gradients": gradients, "optimizer": optimizer_states}
    for name, kind in kinds.items():
        new = {address: size for address, size in kind(engine, task).items() if address not in seen}
        result[name] = sum(new.values())
        seen |= new
    result["other"] = sum(size for address, size in all_live().items() if address not in seen)
    return result


def run(plan: Plan) -> dict[str, int]:
    """Measure after the first forward pass of the second step, and after its backward pass."""
    before = all_live()
    task = make_task(plan, {"pad_token_id": 0})
    swap = open_swap_folder(plan)
    engine = build_engine(plan, task.build_model(), max_steps=4, swap=swap)
    accumulation = plan.batch.gradient_accumulation_steps
    place = plan.layout.coordinates(int(os.environ["RANK"]))
    make = MAKE.get(plan.recipe.task, two_documents)
    cut = own_part(lambda _: make(plan), plan.layout, place)
    for micro_step in range(accumulation + 1):
        torch.manual_seed(micro_step)  # tensor-parallel ranks see the same tokens
        batch = cut([])
        counter = LiveStorages()
        counter.ignore(thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta)
        with counter:
            output = task.loss(engine, batch)
        gc.collect()
        gathered = counter.bytes_of(engine.module.parameters())
        activations = counter.live - gathered
        engine.backward(output.loss_sum)
        del output
        if micro_step == accumulation:
            result = measure(engine, task, before)
        engine.step()
    engine.destroy()
    if swap is not None:
        swap.close()
    return {**result, "activations": activations, "gathered": gathered}


def two_documents(plan: Plan) -> dict[str, torch.Tensor]:
    """A micro batch whose rows hold two documents each, unless the recipe has one document in a row."""
    shape = (plan.batch.micro_batch_size, plan.recipe.data.sequence_length)
    ids, labels = (torch.randint(1, 64, shape) for _ in range(2))
    documents = 1 if plan.recipe.data.packing == "none" else 2
    positions = (torch.arange(shape[1]) % (shape[1] // documents)).repeat(shape[0], 1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def two_answers(plan: Plan) -> dict[str, torch.Tensor]:
    """A micro batch of pairs, whose first half are prompts."""
    shape = (2 * plan.batch.micro_batch_size, plan.recipe.data.sequence_length)
    labels = torch.randint(1, 64, shape)
    labels[:, : shape[1] // 2] = -100
    return {"input_ids": torch.randint(1, 64, shape), "labels": labels}


def judged_answers(plan: Plan) -> dict[str, torch.Tensor]:
    """A micro batch of KTO's: answers that are good or bad, and the same prompts with other answers."""
    shape = (plan.batch.micro_batch_size, plan.recipe.data.sequence_length)
    batch = {"desirable": torch.arange(shape[0]) % 2 == 0}
    for prefix in ("", "other_"):
        labels = torch.randint(1, 64, shape)
        labels[:, : shape[1] // 2] = -100
        batch |= {f"{prefix}input_ids": torch.randint(1, 64, shape), f"{prefix}labels": labels}
    return batch


MAKE = {"preference": two_answers, "kto": judged_answers}


def main() -> None:
    """Measure every plan in turn, in one process group."""
    join_process_group("cpu", int(os.environ["LOCAL_RANK"]))
    gc.freeze()  # what the libraries hold is not ours; without it every walk over the objects takes half a second
    plans = [Plan.model_validate(plan) for plan in json.loads(Path(sys.argv[1]).read_text())]
    results = []
    for plan in plans:
        results.append(run(plan))
        gc.collect()
    target = Path(sys.argv[2]) / f"rank_{os.environ['RANK']}.json"
    target.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
