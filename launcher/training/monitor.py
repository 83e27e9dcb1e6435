"""What a run records: `metrics.jsonl` and TensorBoard event files, written by rank 0."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from launcher.planning.accelerators import model_flops_per_token, peak_flops
from launcher.planning.measured import planned_memory, planned_seconds
from launcher.planning.plan import Plan
from launcher.recipe.loading import dump_recipe
from launcher.run_directory import RunDirectory, append_json_line, read_json_lines, write_atomically
from launcher.tasks import Metrics
from launcher.training.context import STEP_PHASES, Beat
from launcher.training.figures import curves_picture

TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens_per_second": "performance/tokens_per_second",
    "samples_per_second": "performance/samples_per_second",
    "step_seconds": "performance/step_seconds",
    "model_flops_per_second": "performance/model_flops_per_second",
    "mfu": "performance/mfu",
    "memory_bytes": "performance/memory_bytes",
    "eval_loss": "evaluation/loss",
    "eval_perplexity": "evaluation/perplexity",
}
"""Key in metrics.jsonl -> TensorBoard tag."""
_PLANNED = {"step": "performance/step_seconds_planned", "memory": "performance/memory_bytes_planned"}
"""What the plan says, drawn beside what is measured."""


class Throughput:
    """Samples and seconds of training proper since the last reading; evaluation and saving are taken out."""

    def __init__(self) -> None:
        self._samples = 0
        self._steps = 0
        self._seconds = 0.0
        self._started = time.perf_counter()

    def step_begins(self) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def step_ends(self, samples: int) -> None:
        """Count a step of so many samples."""
        self._seconds += time.perf_counter() - self._started
        self._samples += samples
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """(samples per second, seconds per step) since the last reading."""
        samples, steps, seconds = self._samples, self._steps, self._seconds
        self._samples, self._steps, self._seconds = 0, 0, 0.0
        return (samples / seconds, seconds / steps) if steps and seconds > 0 else (math.nan, math.nan)


class PhaseSeconds:
    """Seconds of each phase of a step, between two readings."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._steps = 0

    def read(self, beat: Beat) -> dict[str, float]:
        """Seconds a step since the last reading; empty when no step was made."""
        steps, spent = beat.steps_made - self._steps, beat.spent
        if steps < 1:
            return {}
        phases = {
            phase.value: (spent.get(phase.value, 0.0) - self._spent.get(phase.value, 0.0)) / steps
            for phase in STEP_PHASES
        }
        self._spent, self._steps = dict(spent), beat.steps_made
        return phases


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or this process's resident bytes on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


class Monitor:
    """Rank 0's recorder; on other ranks nothing makes one.

    Args:
        plan: of the run.
        run_directory: of the run.
        step: where the run resumes: records of later steps, which will be made again, are dropped.
        device: of rank 0, whose peak FLOP/s decide whether there is an MFU.
    """

    def __init__(self, plan: Plan, run_directory: RunDirectory, step: int, device: torch.device) -> None:
        self.plan = plan
        self.path = run_directory.metrics
        self.tokens_per_sample = plan.recipe.data.sequence_length
        self._drop_after(step)
        self._flops_per_sample: float | None = None
        self._peak_flops: float | None = None
        if plan.model is not None:
            per_token = model_flops_per_token(plan.model, plan.recipe.data.sequence_length)
            self._flops_per_sample = float(per_token) * self.tokens_per_sample
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), plan.recipe.training.precision)
            self._peak_flops = None if peak is None else peak * plan.layout.world_size
        self._phases = PhaseSeconds()
        self._planned: dict[str, float | None] = {**planned_seconds(plan), "memory": planned_memory(plan)}
        self._writer = self._open_writer(run_directory.tensorboard, step) if plan.recipe.logging.tensorboard else None

    def _drop_after(self, step: int) -> None:
        records = read_json_lines(self.path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records) or (self.path.exists() and not self.path.read_bytes().endswith(b"\n")):
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def _open_writer(self, folder: Path, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        if step == 0:
            writer.add_text("recipe", f"```yaml\n{dump_recipe(self.plan.recipe)}\n```", 0)
            writer.add_text("deepspeed", f"```json\n{json.dumps(self.plan.deepspeed_config, indent=2)}\n```", 0)
            self._write_hyperparameters(writer)
        return writer

    def _write_hyperparameters(self, writer: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        training = self.plan.recipe.training
        values = {
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": training.lr_scheduler_type,
            "global_batch_size": self.plan.batch.global_batch_size,
            "weight_decay": self.plan.recipe.optimizer.weight_decay,
            "sequence_length": self.plan.recipe.data.sequence_length,
            "precision": training.precision,
            "zero_stage": self.plan.zero_stage,
            "world_size": self.plan.layout.world_size,
            "seed": self.plan.recipe.seed,
            "parameters": self.plan.model.num_parameters if self.plan.model else 0,
        }
        for summary in hparams(values, {TENSORBOARD_TAGS["eval_loss"]: 0, TENSORBOARD_TAGS["loss"]: 0}):
            writer.file_writer.add_summary(summary)

    def rates(self, throughput: Throughput, beat: Beat) -> dict[str, Any]:
        """Tokens, samples and model FLOPs per second since the last reading; MFU where the device's peak is known.

        And the seconds of each phase of a step, on this rank's host: on a GPU, whose work runs behind the host's, a
        phase can hold the time of an earlier one, and only their sum is exact.
        """
        samples_per_second, step_seconds = throughput.read()
        rates: dict[str, Any] = {
            "phase_seconds": self._phases.read(beat),
            "tokens_per_second": samples_per_second * self.tokens_per_sample,
            "samples_per_second": samples_per_second,
            "step_seconds": step_seconds,
        }
        if self._flops_per_sample is not None:
            rates["model_flops_per_second"] = samples_per_second * self._flops_per_sample
            if self._peak_flops is not None:
                rates["mfu"] = rates["model_flops_per_second"] / self._peak_flops
        return rates

    def record(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Write one record to metrics.jsonl and its numbers to TensorBoard; returns the record.

        Numbers that JSON has no name for (NaN, infinities) are written as null.
        """
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        append_json_line(self.path, record)
        if self._writer is not None:
            for tag, value in self._scalars(values):
                self._writer.add_scalar(tag, value, step)
        return record

    def _scalars(self, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for key, tag in TENSORBOARD_TAGS.items():
            if values.get(key) is not None:
                yield tag, values[key]
        for key in values.keys() - TENSORBOARD_TAGS.keys():
            if key.startswith("eval_") and key != "eval_targets":
                yield f"evaluation/{key.removeprefix('eval_')}", values[key]
        for phase, seconds in values.get("phase_seconds", {}).items():
            yield f"phases/{phase}_seconds", seconds
            if self._planned.get(phase) is not None:
                yield f"phases/{phase}_seconds_planned", self._planned[phase] or 0.0
        if "step_seconds" in values:
            for name, tag in _PLANNED.items():
                planned = self._planned.get(name)
                if planned is not None:
                    yield tag, planned

    def record_texts(self, step: int, texts: dict[str, str]) -> None:
        """Write generated samples, continuation by prompt."""
        for index, (prompt, continuation) in enumerate(texts.items()):
            append_json_line(
                self.path.with_name("samples.jsonl"), {"step": step, "prompt": prompt, "text": continuation}
            )
            if self._writer is not None:
                self._writer.add_text(f"samples/{index}", f"```\n{prompt}{continuation}\n```", step)

    def record_report(self, step: int, metrics: Metrics) -> None:
        """Write an evaluation's tables to TensorBoard: report, samples, and as pictures confusion matrix and curves."""
        if self._writer is None:
            return
        for index, sample in enumerate(metrics.report.get("samples", [])):
            parts = "\n\n".join(f"**{name}**\n\n```\n{text}\n```" for name, text in sample.items())
            self._writer.add_text(f"samples/{index}", parts, step)
        if metrics.text:
            self._writer.add_text("evaluation/report", f"```\n{metrics.text}\n```", step)
        for kind, lines in metrics.report.get("curves", {}).items():
            if lines:
                self._writer.add_image(f"evaluation/{kind}", curves_picture(lines), step, dataformats="HWC")
        for name, pixels in metrics.pictures.items():
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        if "confusion_matrix" in metrics.report:
            rows = np.array(metrics.report["confusion_matrix"]["rows"], np.float64)
            shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1)
            side = max(1, 256 // len(shares))
            picture = np.kron(shares, np.ones((side, side)))
            self._writer.add_image("evaluation/confusion_matrix", picture, step, dataformats="HW")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
