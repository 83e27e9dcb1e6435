"""The recipe: what to train. Frozen, unknown keys refused everywhere, fields named as in Hugging Face and DeepSpeed.

The strings under the fields are their documentation: ``zerofleet schema`` prints them as JSON Schema.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from launcher.recipe.method_sections import EmaSection
from launcher.recipe.section import Section
from launcher.recipe.task_sections import (
    AdapterSection,
    AudioSection,
    ClassificationSection,
    DistillationSection,
    EmbeddingSection,
    ImageSection,
    KtoSection,
    MaskedLanguageModellingSection,
    PreferenceSection,
    SequenceToSequenceSection,
)
from launcher.recipe.tasks import TASKS, TaskName


class ModelSection(Section):
    """Which model: pretrained weights, or a configuration to start from random weights."""

    model_name_or_path: str | None = None
    """Folder or hub name of pretrained weights."""
    config: dict[str, Any] | str | None = None
    """Train from random weights with this transformers configuration: a mapping with `model_type`, or the path of a
    `config.json`."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel, as in transformers; `sdpa` means `eager` for a family that has no `sdpa`."""
    freeze: tuple[str, ...] = ()
    """Globs of parameters that are not trained, matched against their names (`*.embeddings.*`; `*`: all)."""
    unfreeze: tuple[str, ...] = ()
    """Globs of parameters that are trained all the same (`classifier.*`)."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("set exactly one of model_name_or_path (pretrained weights) and config (random weights)")
        if isinstance(self.config, dict) and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama, qwen3 or gpt2")
        return self


class TrainTokenizerSection(Section):
    """Train a byte-level BPE tokenizer on the training documents."""

    vocab_size: int = Field(ge=257, le=1_000_000)
    """Number of tokens, the 256 bytes and the special tokens included."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair must occur this often to be merged."""
    max_bytes: int = Field(default=2**27, ge=2**20)
    """Learn from at most so many bytes of text, picked by a hash of the text; more costs time and changes little."""


class TokenizerSection(Section):
    """Which tokenizer: the model's own (default), another one, or one trained from the data."""

    tokenizer_name_or_path: str | None = None
    """Folder or hub name; default: the model's."""
    train: TrainTokenizerSection | None = None
    """Train one from the training documents instead of loading one."""
    chat_template: str | None = None
    """A file with a Jinja template, or `chatml`; default: the loaded tokenizer's own."""
    pad_token: str | None = None
    """Which token of a loaded tokenizer pads, where it names none itself."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSection":
        if self.tokenizer_name_or_path is not None and self.train is not None:
            raise ValueError("set tokenizer_name_or_path or train, not both")
        return self


class _SourceBase(Section):
    text_column: str = "text"
    """Column that holds the text."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column holds what a task reads (`{text: review, label: stars}`), where its name is another one."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the other sources' weights."""


class TextSource(_SourceBase):
    """Plain text files."""

    type: Literal["text"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one document is: a file, a paragraph (separated by an empty line) or a line."""
    pattern: str | None = None
    """A Python regular expression: each match in a file is one example, its named groups (`(?P<prompt>...)`) are the
    columns. In place of sample_by."""
    label_from_folder: bool = False
    """Give each document the name of its file's folder as `label`."""

    @model_validator(mode="after")
    def _pattern_has_groups(self) -> "TextSource":
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from error
            if not groups:
                raise ValueError("pattern names no group: write (?P<text>...) for what is to be read")
        return self


class TableSource(_SourceBase):
    """JSON (lines or array), CSV or Parquet files."""

    type: Literal["json", "jsonl", "csv", "parquet"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class SavedSource(_SourceBase):
    """A folder written by `Dataset.save_to_disk`."""

    type: Literal["saved"]
    path: str
    """The folder; relative ones are taken from the folder of the recipe."""
    split: str = "train"
    """Split, when the folder holds a DatasetDict."""


class ImageFolderSource(_SourceBase):
    """Image files in one folder a class: `images/CLASS/*.png`."""

    type: Literal["image_folder"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class AudioFolderSource(_SourceBase):
    """WAV files in one folder a class: `sounds/CLASS/*.wav`."""

    type: Literal["audio_folder"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class ScikitLearnSource(_SourceBase):
    """A data set that comes inside scikit-learn's own package."""

    type: Literal["sklearn"]
    name: Literal["digits"]
    """`digits`: 1,797 images of 8 x 8 pixels, in ten classes."""


class HubSource(_SourceBase):
    """A data set by hub name."""

    type: Literal["hub"]
    path: str
    """Name on the hub, such as `HuggingFaceFW/fineweb`."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split, with datasets' slicing syntax (`train[:1%]`)."""
    revision: str | None = None
    """Commit or tag, to pin what is read."""


Source = Annotated[
    TextSource | TableSource | SavedSource | ImageFolderSource | AudioFolderSource | ScikitLearnSource | HubSource,
    Field(discriminator="type"),
]


class DataSection(Section):
    """Which data, and how documents become samples."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training data; several sources are mixed by weight."""
    validation_sources: tuple[Source, ...] = ()
    """Held-out data; default: split off the sources by `validation_fraction`."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the documents that is held out; a document's side depends on its text alone, never on file order."""
    sequence_length: int = Field(default=1, ge=1)
    """Tokens per sample, at most; 1 for tasks without text."""
    format: Literal["text", "prompt_completion", "chat"] = "text"
    """What `causal_lm` reads: plain text; a `prompt` and its `completion`; or a list of `messages`, as the tokenizer's
    chat template writes them. Of the last two only completions and the assistant's words are learnt."""
    packing: Literal["concat", "first_fit_decreasing", "none"] = "concat"
    """`concat`: one stream cut every sequence_length tokens, nothing wasted, documents are cut; `first_fit_decreasing`:
    documents that fit are kept whole, a little padding; `none`: one document a sample, cut or padded."""
    cross_document_attention: bool = False
    """Let packed documents attend to each other and predict each other's first token."""
    max_bad_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of the examples of labelled tasks that may be unusable (empty texts, unreadable images, answers that are
    not in their context): they are left out and counted; more of them is an error."""
    preprocessing_num_workers: int | None = Field(default=None, ge=1)
    """Threads that tokenise; default: the number of cores."""
    on_change: Literal["error", "continue", "restart"] = "error"
    """When a run resumes and the data is not what it was: refuse; go on at the same position of the new data's order;
    or begin the new data from its start, with the model and the schedule as they are."""
    cache_directory: str | None = None
    """Where prepared data is kept, on a file system that all nodes see; default: `$ZEROFLEET_CACHE` or
    `~/.cache/zerofleet`."""

    @model_validator(mode="after")
    def _one_validation(self) -> "DataSection":
        if self.validation_sources and self.validation_fraction:
            raise ValueError("set validation_sources or validation_fraction, not both")
        return self


class AdversarialSection(Section):
    """Train on disturbed embeddings, or pixels, besides the true ones."""

    method: Literal["fgm", "pgd"] = "fgm"
    """One step along the gradient (Miyato et al., arXiv 1605.07725), or several projected ones (Madry et al., arXiv
    1706.06083); disturbances are measured by each sample's Euclidean norm."""
    epsilon: float = Field(default=1.0, gt=0)
    """Largest norm of a sample's disturbance."""
    steps: int = Field(default=3, ge=1)
    """Of `pgd`; each one as long as 1.5 epsilon / steps."""


class TrainingSection(Section):
    """Batch sizes, length, schedule and precision."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps to make."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, instead of max_steps."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per worker in one forward and backward pass."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Micro batches per optimizer step."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step: micro_batch_size x gradient_accumulation_steps x data-parallel size."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of forward and backward; the optimizer's copy of the weights stays fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine"
    """A name of transformers.get_scheduler: linear, cosine, cosine_with_min_lr, constant_with_warmup,
    warmup_stable_decay, ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scheduler, such as `{min_lr_rate: 0.1}`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Warm-up as a share of all steps, instead of warmup_steps."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts (Fedus et al., arXiv 2101.03961, equations 4 to 6),
    added to the training loss of each micro batch, not at evaluation; default: the model config's, where that says
    `output_router_logits: true`, otherwise 0."""
    adversarial: AdversarialSection | None = None
    """Add the loss on disturbed inputs to the loss; ZeRO stages 0 to 2, data parallel."""
    ema: EmaSection | None = None
    """Keep a moving average of the weights, which is evaluated and exported; data parallel."""

    @property
    def uses_average(self) -> bool:
        """Whether the averaged weights are what is evaluated and exported."""
        return self.ema is not None and self.ema.use

    @model_validator(mode="after")
    def _one_of_each(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("set exactly one of max_steps and num_train_epochs")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        return self


class OptimizerSection(Section):
    """The optimizer and its constants; the learning rate and its schedule stand under `training`."""

    type: Literal["adamw", "sgd", "adafactor", "muon", "lion"] = "adamw"
    """`adamw`: Loshchilov and Hutter, arXiv 1711.05101; `sgd`: stochastic gradient descent with momentum; `adafactor`:
    Shazeer and Stern, arXiv 1804.04235, torch's; `muon`: Jordan et al. 2024, DeepSpeed's, for the matrices of the
    layers, with AdamW for the rest; `lion` is known and refused."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, decoupled from the gradient but with `sgd`; biases and normalisation weights are not decayed."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Of `sgd` (default 0) and `muon` (default 0.95)."""
    adam_learning_rate: float | None = Field(default=None, gt=0)
    """Of `muon`: the peak rate of what it leaves to AdamW (embeddings, head, norms, biases); default: the same."""
    layer_wise_lr_decay: float | None = Field(default=None, gt=0, lt=1)
    """Each layer learns at this share of the rate of the layer above it (Howard and Ruder, arXiv 1801.06146); the head
    at training.learning_rate, the embeddings at the lowest rate."""
    unfreeze_every_steps: int | None = Field(default=None, ge=1)
    """Train the head alone for so many steps, then the layer below it too, and so on down to the embeddings (gradual
    unfreezing, of the same authors): the others have a learning rate of 0. Their gradients are made all the same."""
    decay_to_start: float = Field(default=0.0, ge=0)
    """Decay of the weights towards those that training began with (L2-SP, Li et al., arXiv 1802.01483), decoupled from
    the gradient as weight_decay is; for all that is trained."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


def _or_auto(schema: dict[str, Any]) -> None:
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"const": "auto", "description": "Have the planner choose."}, section]


class ParallelSection(Section):
    """How a model is spread over workers; what is left of the world size is data parallel.

    `parallel: auto` has the planner choose: the fastest layout that fits the machines, with micro batch and
    accumulation, and with ZeRO stage, offload and recomputation where the recipe leaves them out.
    """

    model_config = ConfigDict(json_schema_extra=_or_auto)

    auto: bool = False
    """Have the planner choose; the same as `parallel: auto`."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share each layer's matrices."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages that share the layers."""
    pipeline_partition: Literal["parameters", "time"] = "parameters"
    """What the stages share equally: parameters (memory), or an estimate of the time of each layer."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """Workers that share each sequence."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Workers that share the experts of a mixture-of-experts model."""

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _auto_or_sizes(self) -> "ParallelSection":
        if self.auto and any(name.endswith("_size") for name in self.model_fields_set):
            raise ValueError("auto chooses all sizes; leave them out, or leave auto out")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its field's name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_size")}


class ZeroSection(Section):
    """ZeRO (Rajbhandari et al., arXiv 1910.02054): which model states are sharded, and where they live."""

    stage: int | None = Field(default=None, ge=0, le=3)
    """0: none; 1: optimizer states; 2: and gradients; 3: and parameters. Default: the DeepSpeed config's, or 2."""
    offload_optimizer: Literal["none", "cpu"] | None = None
    """Keep optimizer states in host memory."""
    offload_param: Literal["none", "cpu"] | None = None
    """Keep parameters in host memory (stage 3)."""


class DeepSpeedSection(Section):
    """The DeepSpeed JSON under the recipe."""

    config: str | None = None
    """A file, or the name of one in `deepspeed_configs/`; default: the one for zero.stage and its offload."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed keys laid over the file; a key that the pinned DeepSpeed does not know is an error."""


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
    on_bad_loss: Literal["stop", "rollback"] = "stop"
    """When the loss is NaN or infinite, or a spike: end the run, or go back to the last checkpoint and leave the batch
    out; what was left out stands in `skipped.jsonl`."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """A loss so many times the median of the 50 steps before is a spike; null: only NaN and infinity are bad."""
    max_bad_losses: int = Field(default=10, ge=0)
    """So many times a run goes back because of a bad loss."""
    warm_workers: bool = True
    """Keep a spare process for each worker, on its node, that has imported everything, so that a restart need not; on
    CPU. A node with less than 4 GiB free keeps none."""
    warm_workers_after_seconds: float = Field(default=30.0, ge=0)
    """Start the spares so long after the first step; a run that is over before needs none."""
    preflight: bool = True
    """Before a run of several nodes, compare them: versions, code, disks, clocks, the run directory, the network."""
    save_before_end_seconds: int = Field(default=300, ge=10, le=65_535)
    """How long before its time is over a job must save and stop; a step and a save must fit in. It goes on in the
    job's next start."""


class Recipe(Section):
    """One training: what, from which data, for how long. It names no machine."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Names the run; the run directory is `runs/NAME` unless given."""
    description: str = ""
    """For people."""
    task: TaskName = "causal_lm"
    """What the model learns to do."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Of initial weights, sample order, split and dropout."""
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    classification: ClassificationSection = ClassificationSection()
    image: ImageSection = ImageSection()
    audio: AudioSection = AudioSection()
    adapter: AdapterSection | None = None
    """Train added weights instead of the model's own; checkpoints then hold only what is trained."""
    distillation: DistillationSection | None = None
    """Learn from a teacher too, while training."""
    embedding: EmbeddingSection = EmbeddingSection()
    kto: KtoSection = KtoSection()
    masked_lm: MaskedLanguageModellingSection = MaskedLanguageModellingSection()
    preference: PreferenceSection = PreferenceSection()
    seq2seq: SequenceToSequenceSection = SequenceToSequenceSection()
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    profiling: ProfilingSection = ProfilingSection()
    export: ExportSection = ExportSection()
    fault_tolerance: FaultToleranceSection = FaultToleranceSection()

    @model_validator(mode="after")
    def _fits_its_task(self) -> "Recipe":
        entry = TASKS[self.task]
        if self.data.format != "text" and self.task != "causal_lm":
            raise ValueError(f"data.format is for causal_lm; what {self.task} reads is named by the sources' columns")
        if self.data.format != "text" and self.data.packing not in ("concat", "none"):
            raise ValueError(f"data.packing is for plain text: with format {self.data.format}, a sample is one example")
        if self.evaluation.generate.prompts and not entry.generates:
            raise ValueError(f"task {self.task} generates no text: leave evaluation.generate.prompts out")
        sizes = self.parallel
        spread = (
            max(
                sizes.tensor_parallel_size,
                sizes.pipeline_parallel_size,
                sizes.sequence_parallel_size,
                sizes.expert_parallel_size,
            )
            > 1
        )
        if not entry.packed_text and spread:
            raise ValueError(f"task {self.task} is data parallel only, with any ZeRO stage: leave parallel out")
        if self.data.format != "text" and spread:
            raise ValueError(
                f"data.format {self.data.format} makes batches of different lengths, which no test of ours has trained "
                "but data parallel: leave parallel out"
            )
        for name in ("layer_wise_lr_decay", "unfreeze_every_steps"):
            if getattr(self.optimizer, name) is not None and spread:
                raise ValueError(f"optimizer.{name} is for data parallel runs: leave parallel out")
        if self.optimizer.unfreeze_every_steps is not None and self.optimizer.type not in ("adamw", "sgd"):
            raise ValueError("optimizer.unfreeze_every_steps is for adamw and sgd")
        if self.training.adversarial is not None and (spread or self.zero.stage == 3 or self.adapter is not None):
            raise ValueError(
                "training.adversarial is for data parallel runs of the whole model under ZeRO stages 0 to 2: leave "
                "parallel and adapter out, and set zero.stage to 2"
            )
        if self.training.router_aux_loss_coef and self.task != "causal_lm":
            raise ValueError(f"training.router_aux_loss_coef is for causal_lm, not for {self.task}")
        if (self.model.freeze or self.model.unfreeze) and spread:
            raise ValueError("model.freeze is for data parallel runs, with any ZeRO stage: leave parallel out")
        if self.distillation is not None:
            if self.task not in ("causal_lm", "sequence_classification"):
                raise ValueError(f"distillation is for causal_lm and sequence_classification, not for {self.task}")
            if self.task != "causal_lm" and self.classification.problem_type != "single_label":
                raise ValueError("distillation needs classes that exclude one another: problem_type single_label")
            if spread:
                raise ValueError("distillation is data parallel, with any ZeRO stage: leave parallel out")
        if self.adapter is not None:
            if self.model.freeze or self.model.unfreeze:
                raise ValueError(
                    "an adapter leaves the whole model as it is: leave model.freeze and model.unfreeze out"
                )
            if spread:
                raise ValueError("an adapter is trained data parallel, with any ZeRO stage: leave parallel out")
            packs = reads_packed_text(self) and self.data.packing != "none" and not self.data.cross_document_attention
            if self.adapter.is_prompt and packs:
                raise ValueError(
                    f"{self.adapter.method} puts one prompt before each row, not before each document packed into it: "
                    "set data.packing to none"
                )
        if TASKS[self.task].tokens and self.data.sequence_length < 2:
            raise ValueError(f"task {self.task} reads text: set data.sequence_length to 2 or more")
        return self

    @model_validator(mode="after")
    def _tokenizer_has_an_origin(self) -> "Recipe":
        if not TASKS[self.task].tokens:
            return self
        loaded = self.tokenizer.tokenizer_name_or_path or self.model.model_name_or_path
        if loaded is None and self.tokenizer.train is None:
            raise ValueError("a model from config needs tokenizer.tokenizer_name_or_path or tokenizer.train")
        return self


def reads_packed_text(recipe: Recipe) -> bool:
    """Whether a recipe's samples are rows of packed text; otherwise its task's encoder makes examples."""
    return TASKS[recipe.task].packed_text and recipe.data.format == "text"
