"""One rank on one GPU, without Ray: a plan, our model and engine, steps on random tokens, and what they measured.

The path is that of a worker: `make_plan`, `build_model`, `build_engine`, `make_passes`. No hub is asked: weights are
random, tokens too.
"""

import os
import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

NO_GPU = """\
this benchmark measures a GPU, and torch sees none here (torch.cuda.is_available() is false).
Run it on a machine with one; --tiny runs the same path on the CPU with a small model, and its figures mean nothing."""


@dataclass(frozen=True)
class Case:
    """One training to measure.

    Attributes:
        name: of the case.
        config: of transformers.
        sequence_length: in tokens.
        micro_batch_size: in samples.
        accumulation: micro batches of a step.
        zero: section `zero` of the recipe.
        checkpointing: recompute activations.
        attention: kernel.
        tiles: parts of the sequence over which MLPs and loss are computed.
        lora_rank: train an adapter of this rank on frozen weights; 0 trains all of them.
        published: tokens a second on one device that the case is held against, and where they stand.
    """

    name: str
    config: dict[str, Any]
    sequence_length: int
    micro_batch_size: int
    accumulation: int = 1
    zero: dict[str, Any] | None = None
    checkpointing: bool = False
    attention: str = "sdpa"
    tiles: int = 1
    lora_rank: int = 0
    published: tuple[float, str] | None = None

    def tiny(self) -> "Case":
        """The same kind of training, small enough for a CPU."""
        small = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64,
        }  # fmt: skip
        config = {key: small.get(key, value) for key, value in self.config.items()}
        return replace(
            self,
            config=config,
            sequence_length=64,
            micro_batch_size=1,
            lora_rank=min(self.lora_rank, 2),
            published=None,
        )


@dataclass(frozen=True)
class Measured:
    """What a case measured; bytes are those of the device, and 0 on CPU, which keeps no count of them."""

    name: str
    device: str
    tokens_per_second: float
    step_seconds: float
    mfu: float | None
    peak_bytes: int
    planned_bytes: int | None
    planned_tokens_per_second: float | None


def choose_device(*, tiny: bool) -> str:
    """`cuda`, or `cpu` for a tiny run; ends the program with 2 where neither is possible."""
    import torch

    if tiny:
        return "cpu"
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    return "cuda"


def join(device: str) -> Any:
    """Be the only rank of a group; returns torch's device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cpu":
        os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")
    from launcher.training.distributed import join_process_group

    return join_process_group(device, 0)


def make_case_plan(case: Case, device: str) -> Any:
    """The plan of a case on one device."""
    import torch

    from launcher.errors import PlanError
    from launcher.planning.accelerators import find_accelerator
    from launcher.planning.layout import Resources
    from launcher.planning.plan import make_plan
    from launcher.recipe.schema import Recipe

    recipe = {
        "name": case.name,
        "model": {"config": case.config, "attn_implementation": case.attention},
        "tokenizer": {"tokenizer_name_or_path": "none/none"},
        "data": {"sources": [{"type": "text", "files": ["none.txt"]}], "sequence_length": case.sequence_length},
        "training": {
            "max_steps": 1000, "micro_batch_size": case.micro_batch_size, "precision": "bf16",
            "gradient_accumulation_steps": case.accumulation, "gradient_checkpointing": case.checkpointing,
            "mlp_tiles": case.tiles, "loss_tiles": case.tiles,
        },
        "zero": case.zero or {"stage": 1},
    }  # fmt: skip
    if case.lora_rank:
        matrices = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        recipe["adapter"] = {
            "method": "lora", "r": case.lora_rank, "lora_alpha": 2 * case.lora_rank, "target_modules": matrices
        }  # fmt: skip
    recipe["data"] |= {"cross_document_attention": True}  # type: ignore[operator]  # a dict of dicts
    name = None
    if device == "cuda":
        try:
            name = find_accelerator(torch.cuda.get_device_name()).name
        except PlanError:
            print(f"{torch.cuda.get_device_name()} is not in the catalogue: no MFU and no planned time")
    return make_plan(Recipe.model_validate(recipe), Resources(workers_per_node=1, device=device, accelerator=name))


def measure(case: Case, device: Any, *, steps: int, warm_up: int) -> Measured:
    """Train for some steps; the median of those after the warm-up counts."""
    import torch

    from launcher.planning.accelerators import model_flops_per_token, peak_flops
    from launcher.tasks.causal_lm import CausalLanguageModelling
    from launcher.training.context import Heartbeat
    from launcher.training.distributed import Agreement
    from launcher.training.engine import build_engine
    from launcher.training.passes import make_passes

    plan = make_case_plan(case, device.type)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    task = CausalLanguageModelling(plan, {})
    engine = build_engine(plan, task.build_model(), max_steps=1000)
    passes = make_passes(plan, engine, task, device, Heartbeat(0))
    shape = (case.micro_batch_size, case.sequence_length)
    positions = torch.arange(case.sequence_length).repeat(case.micro_batch_size, 1)
    seconds = []
    for _ in range(warm_up + steps):
        batches = [
            {"input_ids": ids, "labels": ids.roll(-1, dims=1), "position_ids": positions}
            for ids in (torch.randint(0, case.config["vocab_size"], shape) for _ in range(case.accumulation))
        ]
        started = time.perf_counter()
        targets = case.accumulation * shape[0] * shape[1]
        passes.train(batches, Agreement(targets, stop=False, save=False, device=device))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[warm_up:])
    tokens = targets / step
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if cuda else None
    flops = None if plan.model is None else model_flops_per_token(plan.model, case.sequence_length)
    result = Measured(
        name=case.name,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        tokens_per_second=tokens,
        step_seconds=step,
        mfu=None if peak is None or flops is None or case.lora_rank else tokens * flops / peak,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
        planned_bytes=None if plan.ranks is None else plan.ranks[0].device_bytes - plan.ranks[0].overhead,
        planned_tokens_per_second=None  # the time of training in part is not estimated
        if plan.step is None or case.lora_rank
        else plan.step.tokens_per_second_per_device,
    )
    engine.destroy()
    return result


def as_text(result: Measured, case: Case) -> str:
    """One case, with what it is held against."""
    parts = [f"{result.name} on {result.device}: {result.tokens_per_second:,.0f} tokens/s"]
    if case.published is not None:
        published, source = case.published
        parts.append(f"{result.tokens_per_second / published:.2f} of {published:,.0f} ({source})")
    if result.mfu is not None:
        parts.append(f"{result.mfu:.1%} MFU = (6 N + 12 L H Q T) x tokens/s / peak (arXiv 2204.02311)")
    if result.planned_tokens_per_second is not None:
        parts.append(f"planned {result.planned_tokens_per_second:,.0f} tokens/s")
    if result.peak_bytes:
        planned = "" if result.planned_bytes is None else f", planned {result.planned_bytes / 2**30:.2f}"
        parts.append(f"peak {result.peak_bytes / 2**30:.2f} GiB{planned}")
    return "\n    ".join(parts)


def as_json(result: Measured) -> dict[str, Any]:
    """For `--json`."""
    return asdict(result)
