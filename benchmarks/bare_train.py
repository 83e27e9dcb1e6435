"""A training loop as a person writes it by hand around `deepspeed.initialize`: what ours is measured against.

It shares no code with the launcher. Started once a rank (`bare_train.py JOB.json`), in the environment that torchrun or
the deepspeed launcher sets, or called in Ray Train's workers (ray_train.py). common.py writes the job file.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def train(job: dict[str, Any]) -> None:
    """Make `job["steps"]` optimizer steps; rank 0 appends {step, time, loss} to `job["records"]` as it logs."""
    import deepspeed
    import deepspeed.ops
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
    from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

    # Training never uses this operation, and building it at the first start would take 30 s: off in every arm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, steps, logging_steps = dist.get_rank(), job["steps"], job["logging_steps"]

    fields = dict(job["model"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if job["weights"] is not None:
        model.load_state_dict(torch.load(job["weights"], weights_only=True))
    schedule = job["scheduler"]
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        lr_scheduler=lambda optimizer: get_scheduler(
            schedule["type"], optimizer, schedule["warmup_steps"], schedule["steps"]
        ),
        config=job["deepspeed"],
    )
    batches = np.load(
        job["batches"], mmap_mode="r"
    )  # [steps, accumulation, ranks, (ids, labels, positions), samples, tokens]
    records = Path(job["records"]).open("a") if rank == 0 else None  # noqa: SIM115 (open until the process ends)

    for step in range(1, steps + 1):
        loss_sum = torch.zeros(())
        micro_batches = torch.from_numpy(batches[(step - 1) % len(batches), :, rank].astype(np.int64))
        for input_ids, labels, position_ids in micro_batches:
            logits = engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        if step == 1 or step % logging_steps == 0 or step == steps:
            loss_sum /= len(micro_batches) * dist.get_world_size()
            dist.all_reduce(loss_sum)
            if records is not None:
                records.write(json.dumps({"step": step, "time": time.time(), "loss": float(loss_sum)}) + "\n")
                records.flush()
    dist.barrier()


if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N, which the environment says too.
    path = next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    train(json.loads(Path(path).read_text()))
    import torch.distributed

    torch.distributed.destroy_process_group()
