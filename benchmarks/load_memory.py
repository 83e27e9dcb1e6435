"""What loading a pretrained model under ZeRO 3 costs each rank in memory: streamed, and as transformers does it.

A Llama of random fp32 weights is written to a folder, of which two ranks fine-tune a recipe's model. Each rank's peak
while it builds the model is compared with its own part of the weights, and every weight with the file, bit by bit.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from common import WORKERS, arm_environment, command_line, free_port, machine, no_process_left, show

ARMS = ("streamed", "transformers")
MIB = 2**20
ALLOWED_MIB_OF_2_GB = 300
"""What a rank may hold besides its part and the largest weight; scaled with the model."""


def main() -> int:
    """Write the model, load it in both ways, print."""
    parser = command_line(__doc__)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the model in fp32, about")
    arguments = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="zfb-") as temporary, no_process_left():
        folder = Path(temporary)
        size = write_model(folder, arguments.megabytes)
        rounds = [{arm: ranks(arm, folder) for arm in ARMS} for _ in range(arguments.rounds)]
    allowed = ALLOWED_MIB_OF_2_GB * MIB * size / 2e9
    for measured in rounds:
        for rank in measured["streamed"] + measured["transformers"]:
            rank["bound"] = round(rank["part"] + rank["largest"] + allowed)
    return show({"machine": facts, "bytes": size, "rounds": rounds}, arguments, print_table)


def print_table(result: dict[str, Any]) -> None:
    """One line for each rank of each arm."""
    print(f"a model of {result['bytes'] / MIB:,.0f} MiB on {WORKERS} ranks; MiB of peak growth, and what is allowed")
    for measured in result["rounds"]:
        for arm in ARMS:
            for number, rank in enumerate(measured[arm]):
                equal = "equal bit by bit" if rank["equal"] else "NOT EQUAL"
                print(
                    f"  {arm:<14}rank {number}  {rank['growth'] / MIB:8,.0f} of {rank['bound'] / MIB:8,.0f}"
                    f"   part {rank['part'] / MIB:,.0f}, largest weight {rank['largest'] / MIB:,.0f}"
                    f"   {rank['seconds']:.1f} s   {equal}"
                )


def write_model(folder: Path, megabytes: int) -> int:
    """Write the model, the recipe and the plan; returns the bytes of the weights."""
    from launcher.planning.layout import Resources
    from launcher.planning.plan import make_plan
    from launcher.recipe.loading import load_recipe

    layers = 12
    # A layer has 4 h2 of attention and 3 x 4 h2 of MLP, the vocabulary twice 8 h2, in 4 bytes each.
    hidden = round((megabytes * 1e6 / 4 / (16 * layers + 16)) ** 0.5 / 64) * 64
    script = f"""
import torch, transformers
torch.manual_seed(1)
config = transformers.LlamaConfig(vocab_size={8 * hidden}, hidden_size={hidden}, intermediate_size={4 * hidden},
    num_hidden_layers={layers}, num_attention_heads={hidden // 64}, tie_word_embeddings=False)
transformers.LlamaForCausalLM(config).save_pretrained({str(folder / "model")!r}, max_shard_size="1GB")
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder / "recipe.yaml").write_text(
        "name: load\nmodel: {model_name_or_path: ./model}\n"
        "data: {sources: [{type: text, files: ['*.txt']}], sequence_length: 8}\n"
        "training: {max_steps: 1, micro_batch_size: 1, precision: fp32}\nzero: {stage: 3}\n"
    )
    plan = make_plan(load_recipe(folder / "recipe.yaml"), Resources(nodes=1, workers_per_node=WORKERS))
    (folder / "plan.json").write_text(plan.model_dump_json())
    return sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))


def ranks(arm: str, folder: Path) -> list[dict[str, Any]]:
    """Load with fresh processes; returns what each rank measured."""
    port = free_port()
    environment = arm_environment(folder) | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "WORLD_SIZE": str(WORKERS),
        "LOCAL_WORLD_SIZE": str(WORKERS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--rank-of", arm, str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(WORKERS)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"the ranks of {arm} failed")
    return [json.loads((folder / f"{arm}-{rank}.json").read_text()) for rank in range(WORKERS)]


def rank_of(arm: str, folder: Path) -> None:
    """Be one rank: load, measure, compare."""
    from launcher.training.distributed import join_process_group

    join_process_group("cpu", 0)
    import deepspeed
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  # imported before the measurement

    from launcher.models import build
    from launcher.planning.plan import Plan

    plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
    torch.distributed.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = status("VmRSS"), time.perf_counter()
    way = nullcontext() if arm == "streamed" else mock.patch.object(build, "streamed_weights", nullcontext)
    with way:
        model = build.build_model(plan, AutoModelForCausalLM)
    result: dict[str, Any] = {"growth": status("VmHWM") - before, "seconds": time.perf_counter() - began}
    parameters: dict[str, Any] = dict(model.named_parameters())
    result["part"] = sum(parameter.ds_tensor.nbytes for parameter in parameters.values())
    result["largest"] = max(parameter.ds_numel * 4 for parameter in parameters.values())
    equal = []
    files: list[Any] = [safe_open(file, framework="pt") for file in (folder / "model").glob("*.safetensors")]
    stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a dictionary
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            equal.append(torch.equal(parameter.detach(), stored[name].get_tensor(name)))
    result["equal"] = all(equal) and len(equal) == len(stored)
    (folder / f"{arm}-{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()


def status(name: str) -> int:
    """Bytes of a field of this process's status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank_of(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
