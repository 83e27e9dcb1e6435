"""The bare loop with a DeepSpeed checkpoint now and then, from which it resumes: what recovery.py's peers run.

`recover_train.py JOB.json` is one rank under torchrun; `recover_train.py JOB.json --ray` starts Ray Train, whose
workers run the same function.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(job: dict[str, Any]) -> None:
    """Train until it is ended; each rank writes its pid, rank 0 a record {step, time, pid} a step."""
    import deepspeed
    import deepspeed.ops
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
    from transformers import AutoConfig, AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see bare_train.py
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, folder = dist.get_rank(), Path(job["folder"])
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    fields = dict(job["model"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    # A constant learning rate: nothing that is compared depends on it.
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=job["deepspeed"])
    step = 0
    if (folder / "latest").exists():
        _, state = engine.load_checkpoint(str(folder))
        step = state["step"]
    batches = np.load(job["batches"], mmap_mode="r")
    records = (folder / "records.jsonl").open("a") if rank == 0 else None
    while True:
        micro_batches = torch.from_numpy(batches[step % len(batches), :, rank].astype(np.int64))
        for input_ids, labels, position_ids in micro_batches:
            logits = engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            engine.backward(F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))
            engine.step()
        step += 1
        if records is not None:
            records.write(json.dumps({"step": step, "time": time.time(), "pid": os.getpid()}) + "\n")
            records.flush()
        if step % job["save_steps"] == 0:
            tag = f"step{step % (2 * job['save_steps'])}"
            engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
            if rank == 0:
                point_to(folder, tag)


def point_to(folder: Path, tag: str) -> None:
    """Name the newest checkpoint once all ranks have written theirs, as whoever wants to recover would.

    DeepSpeed's own `latest` is written before the barrier at the end of a save (runtime/engine.py: save_checkpoint): a
    rank that is killed while it writes leaves a pointer to half a checkpoint, from which no restart comes up.
    """
    new = folder / "latest.new"
    new.write_text(tag)
    new.replace(folder / "latest")


def under_ray_train(job: dict[str, Any]) -> None:
    """Start Ray, and the same function in two workers that are started again as often as they fail."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="zfr-") as folder:
        ray.init(num_cpus=job["workers"], include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        TorchTrainer(
            train,
            train_loop_config=job,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=job["workers"], resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name="bare",
                storage_path=f"{folder}/results",
                failure_config=ray.train.FailureConfig(max_failures=-1),
            ),
        ).fit()


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    under_ray_train(content) if "--ray" in sys.argv else train(content)
