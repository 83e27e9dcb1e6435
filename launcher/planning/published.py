"""Published training throughput, as work and machine of the throughput model, so that the two can be compared.

A row of `published_throughput.csv` says what its source says. What the source leaves out is filled in here, each by one
rule: a model's name gives its shape, a rule of thumb for activations (Korthikanti et al., arXiv 2205.05198, equation 2)
whether it recomputes, and the source its sequence length and micro batch.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from launcher.errors import PlanError, Problem
from launcher.planning.accelerators import NETWORKS, Accelerator, Format, find_accelerator
from launcher.planning.calibration import SOFTWARE
from launcher.planning.layout import Layout
from launcher.planning.model_shape import ModelShape, model_shape
from launcher.planning.throughput import step_time
from launcher.planning.work import Machine, Work

FITTED = frozenset(
    {
        ("Megatron-LM@50a4b5f images/cases_april2021.png", "GPT-530B", "2520"),
        ("Megatron-LM@d98e8a6 images/model_table.png", "GPT-177B", "2304"),
        ("nanotron@2411b02 docs/benchmark_summary.svg", "llama-3.57B", "512"),
        ("nanotron@2411b02 docs/benchmark_summary.svg", "llama-3.57B", "128"),
        ("nanotron@2411b02 docs/benchmark_summary.svg", "llama-1.34B", "64"),
        ("nanotron@2411b02 docs/benchmark_summary.svg", "llama-80B", "32"),
        ("NeMo 24.07 performance_summary.md", "GPT3-175B", "512"),
        ("torchtitan benchmarks/llama3_h100_202412", "Llama3.1-405B 3D 1F1B", "512"),
        ("torchtitan benchmarks/llama3_h100_202412", "Llama3.1-8B FSDP2", "8"),
        ("llm-foundry benchmarking/README.md", "MPT-1B", "8"),
        ("DeepSpeed docs/_posts/2022-07-26-deepspeed-azure.md", "GPT-1T ZeRO-3", "1024"),
    }
)
"""(source, model, GPUs) of the rows that the constants are fitted on; of MPT-1B, that on H100."""

_LLAMA: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "llama-1.34B": (16, 2048, 32, 32, 8192, 131072, True),
    "llama-3.57B": (28, 3072, 32, 32, 8192, 131072, True),
    "llama-8.86B": (32, 4096, 32, 32, 14336, 131072, False),
    "llama-80B": (80, 8192, 64, 64, 28672, 131072, False),
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000, False),
    "llama2-13b": (40, 5120, 40, 40, 13824, 32000, False),
    "llama2-70b": (80, 8192, 64, 8, 28672, 32000, False),
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256, False),
    "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256, False),
    "llama3-70b": (80, 8192, 64, 8, 28672, 128256, False),
    "llama3.1-70b": (80, 8192, 64, 8, 28672, 128256, False),
    "llama3.1-405b": (126, 16384, 128, 8, 53248, 128256, False),
}
"""Layers, width, heads, key heads, width of the MLP, vocabulary, tied: Meta's models from their config.json, nanotron's
from the one Llama shape that has the published number of parameters."""
_MPT: dict[str, tuple[int, int, int]] = {"MPT-70B": (80, 8192, 64)}
"""Layers, width, heads, where the row does not say."""

_SOFTWARE = {
    "Megatron-LM@50a4b5f": "megatron-2021",
    "Megatron-LM": "megatron-core",
    "NeMo": "megatron-core",
    "Megatron-Bridge": "megatron-core",
    "nanotron": "nanotron",
    "torchtitan": "torch-compile",
    "Automodel": "torch-compile",
    "llm-foundry": "torch-eager",
    "DeepSpeed": "megatron-deepspeed",
}
_NETWORK = {"nanotron": "EFA-400"}
_RECOMPUTED = {"full": 1.0, "selective": 0.3, "none": 0.0}
"""Share of the forward pass. torchtitan's `selective` keeps every other matrix product, and attention."""
_SAVED = 34
"""Bytes that a layer keeps for each element of the residual stream, without attention scores (equation 2)."""
_STATES = 16
"""Bytes of parameters, gradients and optimizer states of each parameter."""
_LIMITED_POWER = 0.803
"""What is left of an H100's rate at 500 W; fitted. Its memory is HBM2e: 2.4 TB/s."""


@dataclass(frozen=True)
class PublishedRow:
    """One published figure.

    Attributes:
        source: where it stands.
        model: as the source calls it.
        fitted: the model's constants are fitted on it.
        work: what was done in a step.
        machine: on what.
        tokens_per_second: of one device, as published, or from the published FLOP/s or MFU by the source's own count.
    """

    source: str
    model: str
    fitted: bool
    work: Work
    machine: Machine
    tokens_per_second: float

    @property
    def predicted(self) -> float:
        """Tokens a second of one device, by the model."""
        return step_time(self.work, self.machine).tokens_per_second_per_device

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was published."""
        return self.predicted / self.tokens_per_second - 1


def read_rows(path: Path | None = None) -> list[PublishedRow]:
    """Read published figures.

    Args:
        path: a CSV file with the columns of `launcher/planning/published_throughput.csv`, which is the default.

    Raises:
        PlanError: rows whose model, device or figure is not known; lists all of them.
    """
    text = (path or files("launcher.planning").joinpath("published_throughput.csv")).read_text("utf-8")
    rows, problems = [], []
    for number, fields in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(_row(fields))
        except (ValueError, KeyError) as error:
            problems.append(Problem(f"{fields.get('model')}: {type(error).__name__}: {error}", line=number))
    if problems:
        raise PlanError(str(path or "published_throughput.csv"), problems)
    return rows


def by_source(rows: list[PublishedRow]) -> Iterator[tuple[str, list[PublishedRow]]]:
    """The rows of each source, in the file's order."""
    for source in dict.fromkeys(row.source for row in rows):
        yield source, [row for row in rows if row.source == source]


def _row(fields: Mapping[str, str]) -> PublishedRow:
    source, name = fields["source"], fields["model"]
    shape, gated = _shape(fields)
    program = source.partition(" ")[0]
    software = SOFTWARE[_SOFTWARE.get(program) or _SOFTWARE[program.partition("@")[0]]]
    if program == "torchtitan" and "compile" not in name and fields["precision"] == "bf16":
        software = SOFTWARE["torch-eager"]
    layout = _layout(fields)
    sequence = int(fields["seq"] or 4096)
    batch = int(fields["gbs"] or 8 * layout.world_size) // layout.data_parallel_size
    micro = _micro_batch(fields, software.name, layout)
    accelerator = _device(fields["gpu"])
    stage = _zero_stage(fields["zero_or_fsdp"])
    number_format: Format = "fp8" if "fp8" in fields["precision"] else "bf16"
    work = Work(
        shape=shape,
        gated=gated,
        layout=layout,
        sequence_length=sequence,
        micro_batch_size=micro,
        micro_batches=max(batch // micro, 1),
        zero_stage=stage,
        number_format=number_format,
        virtual_stages=int(fields["VP"] or 1),
        reduces_every_micro_batch=stage == 3 and software.name != "megatron-core",
    )
    recomputed = fields["act_recompute"]
    recomputation = _RECOMPUTED[recomputed] if recomputed else float(not _fits(work, accelerator))
    work = replace(work, recomputation=recomputation)
    network = _NETWORK.get(program.partition("@")[0])
    machine = Machine(accelerator, network=NETWORKS[network] if network else None, software=software)
    fitted = (source, name, fields["gpus"]) in FITTED and (name != "MPT-1B" or fields["gpu"].startswith("H100"))
    return PublishedRow(source, name, fitted, work, machine, _tokens_per_second(fields, work, machine))


def _shape(fields: Mapping[str, str]) -> tuple[ModelShape, bool]:
    name = fields["model"]
    key = name if name in _LLAMA else name.split(" ")[0].lower()
    config: dict[str, Any]
    if key in _LLAMA:
        layers, hidden, heads, key_heads, inner, vocabulary, tied = _LLAMA[key]
        config = {
            "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "intermediate_size": inner, "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        }  # fmt: skip
    else:
        layers, hidden, heads = _MPT.get(name) or (int(fields["layers"]), int(fields["hidden"]), 0)
        heads = int(fields["heads"] or heads or hidden // 128)
        config = {
            "model_type": "mpt", "n_layers": layers, "d_model": hidden, "n_heads": heads,
            "vocab_size": int(fields["vocab"] or 51200),
        }  # fmt: skip
    shape = model_shape(config)
    if shape is None:
        raise ValueError(f"{config} is not a model that the planner counts")
    return shape, config["model_type"] == "llama"


def _layout(fields: Mapping[str, str]) -> Layout:
    devices, tensor, pipeline = int(fields["gpus"]), int(fields["TP"]), int(fields["PP"])
    context = int(fields["CP"] or 1)
    return Layout(
        world_size=devices,
        data_parallel_size=int(fields["DP"] or devices // (tensor * pipeline * context)),
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        sequence_parallel_size=context,
    )


def _micro_batch(fields: Mapping[str, str], software: str, layout: Layout) -> int:
    if software == "torch-compile" and layout.pipeline_parallel_size > 1:
        return 1  # the column holds what each replica does in a step
    if fields["mbs"]:
        return int(fields["mbs"])
    if software == "megatron-deepspeed":
        return 8  # as its other rows
    if layout.pipeline_parallel_size > 1:
        return 1
    return 4  # Megatron's rows without a pipeline: H100's do a replica's whole batch at once


def _device(name: str) -> Accelerator:
    if "500W" in name:
        accelerator = find_accelerator("H100-80GB")
        peak = {number_format: rate * _LIMITED_POWER for number_format, rate in accelerator.peak.items()}
        return replace(accelerator, peak=peak, memory_bandwidth=2.4e12)
    names = {"A100": "A100-80GB", "H100": "H100-80GB", "H200": "H200-141GB", "B200": "B200-180GB"}
    return find_accelerator(names[name.removeprefix("DGX-").partition("-")[0]])


def _zero_stage(text: str) -> int:
    if "FSDP" in text or text == "Z3":
        return 3
    return 0 if text in ("none", "Z0") else 1


def _fits(work: Work, accelerator: Accelerator) -> bool:
    """Whether states and activations fit without recomputation, by the rule of thumb."""
    layout, shape = work.layout, work.shape
    divided = layout.tensor_parallel_size * layout.pipeline_parallel_size
    states = shape.num_parameters * _STATES / divided
    if work.zero_stage == 3:
        states /= layout.data_parallel_size * layout.sequence_parallel_size
    in_flight = min(layout.pipeline_parallel_size, work.micro_batches)
    layers = shape.num_hidden_layers / layout.pipeline_parallel_size * in_flight
    activations = _SAVED * work.tokens * shape.hidden_size * layers / layout.tensor_parallel_size
    return states * (work.zero_stage != 1) + activations < accelerator.memory


def _tokens_per_second(fields: Mapping[str, str], work: Work, machine: Machine) -> float:
    """What the source says, in tokens a second of one device."""
    if fields["tokens_s_gpu"]:
        return float(fields["tokens_s_gpu"])
    shape, length = work.shape, work.sequence_length
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    if fields["tflops_gpu"]:
        # Narayanan et al. (arXiv 2104.04473, equation 3) count 96 with the recomputation that they do, else 72.
        counted = 96 if fields["act_recompute"] == "full" else 72
        flops = counted * layers * hidden**2 * (1 + length / (6 * hidden)) + 6 * shape.vocab_size * hidden
        return float(fields["tflops_gpu"]) * 1e12 / flops
    matrices = shape.num_active_parameters_non_embedding + shape.vocab_size * hidden
    flops = 6 * matrices + 12 * layers * hidden * length
    return float(fields["mfu_pct"]) / 100 * machine.accelerator.peak["bf16"] / flops
