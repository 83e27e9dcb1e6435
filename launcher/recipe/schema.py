"""The recipe: what to train. Frozen, unknown keys refused everywhere, fields named as in Hugging Face and DeepSpeed.

The strings under the fields are their documentation: ``zerofleet schema`` prints them as JSON Schema.
"""

from typing import Annotated

from pydantic import Field, model_validator

from launcher.recipe.data_sections import DataSection
from launcher.recipe.layout_sections import DeepSpeedSection, ParallelSection, ZeroSection
from launcher.recipe.model_sections import ModelSection, TokenizerSection
from launcher.recipe.run_sections import (
    CheckpointSection,
    EvaluationSection,
    ExportSection,
    FaultToleranceSection,
    LoggingSection,
    ProfilingSection,
)
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
from launcher.recipe.training_sections import OptimizerSection, TrainingSection


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
        if shares_rows(self) and self.data.format != "text" and self.data.cross_document_attention:
            raise ValueError("conversations that share a row never see one another: leave cross_document_attention out")
        apart = shares_rows(self) and not self.data.cross_document_attention
        if apart and self.model.attn_implementation == "flash_attention_2" and self.training.micro_batch_size != 1:
            # transformers, _is_packed_sequence: to it, other batches hold one document a row.
            raise ValueError(
                "flash_attention_2 tells the documents of a row apart only in micro batches of one row: set "
                "training.micro_batch_size to 1, or model.attn_implementation to sdpa or flex_attention"
            )
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
            taught = ("causal_lm", "sequence_classification", "image_classification")
            if self.task not in taught:
                raise ValueError(f"distillation is for {', '.join(taught[:-1])} and {taught[-1]}, not for {self.task}")
            if self.task == "image_classification" and (
                self.distillation.precompute or self.distillation.compares_layers
            ):
                raise ValueError(
                    "distillation.precompute, hidden_weight and attention_weight are for texts: pictures are changed "
                    "while training, and layers of pictures have forms of their own"
                )
            if self.task != "causal_lm" and self.classification.problem_type != "single_label":
                raise ValueError("distillation needs classes that exclude one another: problem_type single_label")
            if spread:
                raise ValueError("distillation is data parallel, with any ZeRO stage: leave parallel out")
            if self.distillation.compares_layers and self.adapter is not None:
                raise ValueError(
                    "distillation.hidden_weight and attention_weight are for a student that is trained whole: leave "
                    "adapter out"
                )
            if self.distillation.attention_weight and self.model.attn_implementation != "eager":
                raise ValueError(
                    "distillation.attention_weight: only eager attention tells its probabilities: set "
                    "model.attn_implementation to eager"
                )
        if self.adapter is not None:
            if self.task == "image_text_contrastive":
                raise ValueError("no test of ours has trained an adapter of image_text_contrastive: leave adapter out")
            if self.model.freeze or self.model.unfreeze:
                raise ValueError(
                    "an adapter leaves the whole model as it is: leave model.freeze and model.unfreeze out"
                )
            if spread:
                raise ValueError("an adapter is trained data parallel, with any ZeRO stage: leave parallel out")
            if self.adapter.is_prompt and apart:
                raise ValueError(
                    f"{self.adapter.method} puts one prompt before each row, not before each document packed into it: "
                    "set data.packing to none"
                )
            if self.adapter.is_prompt and self.seq2seq.metrics:
                raise ValueError(
                    f"no test of ours has let a model write behind what {self.adapter.method} learns: leave "
                    "seq2seq.metrics out"
                )
        if self.optimizer.ewc is not None and (self.adapter is not None or self.model.model_name_or_path is None):
            raise ValueError(
                "optimizer.ewc is for a pretrained model that is trained whole: set model.model_name_or_path, and "
                "leave adapter out"
            )
        if self.optimizer.ewc is not None and self.tokenizer.train is not None:
            raise ValueError("optimizer.ewc: an earlier task's tokens are those of a tokenizer that is there already")
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


def derives_data(recipe: Recipe) -> bool:
    """Whether `prepare` asks a model for something, which is kept with the data."""
    return (
        (recipe.distillation is not None and recipe.distillation.precompute)
        or (recipe.task == "preference" and recipe.preference.precompute_reference)
        or (recipe.task == "kto" and recipe.kto.precompute_reference)
        or recipe.optimizer.ewc is not None
    )


def reads_packed_text(recipe: Recipe) -> bool:
    """Whether a recipe's samples are rows of packed text; otherwise its task's encoder makes examples."""
    return TASKS[recipe.task].packed_text and recipe.data.format == "text"


def shares_rows(recipe: Recipe) -> bool:
    """Whether several documents or conversations of a recipe stand in one row."""
    if not TASKS[recipe.task].packed_text:
        return False
    if recipe.data.format != "text":
        return recipe.data.packing == "first_fit_decreasing"
    return recipe.data.packing != "none"
