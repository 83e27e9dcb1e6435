"""Sections of a recipe about a run as it goes on: evaluation, checkpoints, records, export, failures."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.types import DEFAULT_NODE_TIMEOUT_S
from launcher.recipe.section import Section


class GenerationSection(Section):
    """Samples written at each evaluation."""

    prompts: tuple[str, ...] = ()
    """Each one is continued by the model."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens to generate."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy; otherwise sampling at this temperature."""


class EvaluationSection(Section):
    """Validation during training."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; the last step is evaluated in any case when there is validation data."""
    max_eval_samples: int | None = Field(default=None, ge=1)
    """At most so many validation samples at each evaluation: always the same ones, spread evenly over all of them."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without improvement of metric_for_best_model."""
    metric_for_best_model: str = "loss"
    """What early stopping, checkpoint.keep_best and export.checkpoint watch: `loss`, or a metric of the task, such as
    `f1_macro`."""
    greater_is_better: bool | None = None
    """Whether a larger value of it is better; default: yes, but for losses and errors."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """An improvement smaller than this does not count."""
    generate: GenerationSection = GenerationSection()
    """Text to generate at each evaluation."""


class CheckpointSection(Section):
    """When the state is saved, and how much of it is kept."""

    save_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; the last step is saved in any case, and the step at which a signal arrives."""
    save_minutes: float | None = Field(default=None, gt=0)
    """Save when so many minutes have passed since the last save, besides save_steps."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Keep the newest so many; null keeps all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep, besides them, every checkpoint whose step is a multiple of this."""
    keep_best: int = Field(default=0, ge=0)
    """Keep, besides them, so many of the lowest validation loss; only steps that are evaluated and saved can be among
    them."""
    asynchronous: bool = True
    """Copy the state into host memory and write it beside the training; false: training waits for the disk, and the
    host needs no memory for the copy."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a save does that comes while the one before it is being written: it waits, and training with it; or it is
    left out."""
    directory: str | None = None
    """A second place for the checkpoints, this run's alone: any URL that fsspec knows, such as `s3://bucket/run-7`, or
    a path. They are committed in the run directory, copied there meanwhile, and fetched by a machine that has none or
    only older ones."""
    verify: Literal["size", "full"] = "full"
    """What is compared before a checkpoint is trusted: the files' sizes, or their checksums too."""
    max_failed_saves: int = Field(default=3, ge=0)
    """So many saves in a row may fail (a full disk, say) before the run does; the last save of a run must not fail."""


class LoggingSection(Section):
    """What is recorded while training."""

    logging_steps: int = Field(default=10, ge=1)
    """Record loss, learning rate and throughput every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard event files besides metrics.jsonl."""
    sample_ids: bool = False
    """Write which samples each rank trained on at each step to `logs/samples_RANK.jsonl`."""


class ProfilingSection(Section):
    """A window of steps under a profiler; a profiled step is slower than others."""

    start_step: int | None = Field(default=None, ge=1)
    """First step to record with torch's profiler; null records none. The first steps of a run are unlike the others."""
    num_steps: int = Field(default=3, ge=1, le=100)
    """So many steps."""
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Which ranks record; each writes a file to `profile/`."""
    memory: bool = False
    """Record allocations too."""
    shapes: bool = False
    """Record the shapes of what each operation gets."""
    stacks: bool = False
    """Record the lines of code; slow."""
    flops_step: int | None = Field(default=None, ge=1)
    """Have DeepSpeed's FLOPs profiler count this step, layer by layer, into rank 0's log."""


class ExportSection(Section):
    """The Hugging Face folder written at the end."""

    at_end: bool = True
    """Export when the run completes; `zerofleet export` does it at any time."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of the exported weights; default: training.precision."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint is exported at the end: the last one, or the best one that is kept (checkpoint.keep_best)."""


class MemoryCheckpointSection(Section):
    """The newest state in host memory, on the node that made it and on another one, besides the checkpoints on disk."""

    every_steps: int = Field(ge=1)
    """Keep it every so many steps: what a lost worker costs at most, while a lost node may cost a second interval."""


class FaultToleranceSection(Section):
    """What happens when a worker fails."""

    max_restarts: int = Field(default=3, ge=0)
    """Restarts after a crash, from the last checkpoint, before the run gives up; a new checkpoint refills them."""
    max_start_failures: int = Field(default=2, ge=0)
    """Restarts when workers fail before their first step; the first step refills them."""
    max_preemptions: int | None = Field(default=None, ge=0)
    """Restarts after nodes were taken away with notice; null: as many as it takes."""
    restart_delay_seconds: float = Field(default=1.0, ge=0)
    """Wait before the second restart in a row, doubled for each further one; the first one does not wait."""
    max_restart_delay_seconds: float = Field(default=60.0, ge=0)
    """The longest such wait."""
    exclude_node_after: int | None = Field(default=3, ge=1)
    """A node that failed so often gets no workers any more, if there are others; null: never."""
    wait_for_nodes_seconds: float = Field(default=600.0, ge=0)
    """How long a run that lost nodes waits for others before it gives up."""
    resize_interval_seconds: float = Field(default=600.0, ge=0)
    """A run on fewer nodes than its profile's most grows after a save when there are more, but not more often."""
    hang_seconds: float | None = Field(default=None, gt=0)
    """Training that makes no progress for so long hangs, and is started again; default: 30, or 5 steps if that is
    more."""
    stall_seconds: float = Field(default=1800.0, gt=0)
    """The same for what has no visible progress: imports, building and loading the model, saving, the first steps."""
    straggler_factor: float = Field(default=2.0, gt=1)
    """A rank that loads data and computes so many times slower than the others is named."""
    straggler_steps: int = Field(default=10, ge=1)
    """So many steps in a row."""
    on_bad_loss: Literal["stop", "skip", "rollback"] = "stop"
    """When the loss is NaN or infinite, or a spike: end the run; or throw the step's gradients away and go on with the
    next batch, for which each step waits for its loss; or go back to the last checkpoint and leave the batch out. What
    was left out stands in `skipped.jsonl`. In a pipeline, with batch normalisation and with states on NVMe, `skip` is
    `rollback`."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """A loss so many times the median of the 50 steps before is a spike; null: only NaN and infinity are bad."""
    max_bad_losses: int = Field(default=10, ge=0)
    """So many times a run goes back because of a bad loss; so many batches an attempt leaves out in place."""
    warm_workers: bool = True
    """Keep a spare process for each worker, on its node, that has imported everything, so that a restart need not; on
    CPU. A node with less than 4 GiB free keeps none."""
    warm_workers_after_seconds: float = Field(default=30.0, ge=0)
    """Start the spares so long after the first step; a run that is over before needs none."""
    memory_checkpoint: MemoryCheckpointSection | None = None
    """Keep the state in host memory too, so that a restart goes on from there and reads no disk; null: do not. The disk
    is what remains when the driver ends, two neighbouring nodes are lost at once or memory is short."""
    node_timeout_seconds: float = Field(default=DEFAULT_NODE_TIMEOUT_S, ge=3, le=600)
    """A node that dies or is cut off is known to be gone after so long at most, in Ray clusters that ZeroFleet starts;
    a cluster that runs already has its own bound. Less gives up nodes that are only busy."""
    preflight: bool = True
    """Before a run of several nodes, compare them: versions, code, disks, clocks, the run directory, the network."""
    save_before_end_seconds: int = Field(default=300, ge=10, le=65_535)
    """How long before its time is over a job must save and stop; a step and a save must fit in. It goes on in the
    job's next start."""
