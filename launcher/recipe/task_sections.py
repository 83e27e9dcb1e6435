"""Settings of single kinds of training."""

from typing import Literal

from pydantic import Field, model_validator

from launcher.recipe.section import Section


class ClassificationSection(Section):
    """Of the tasks whose targets are classes (or, for `regression`, numbers)."""

    problem_type: Literal["single_label", "multi_label", "regression"] = "single_label"
    """One class an example, any number of them, or a number."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the model's outputs; default: those of the training data, sorted."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """How much an example of each class counts: `balanced` gives all classes the same weight together; scaled so that
    the mean over the training examples is 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes (Szegedy et al., arXiv 1512.00567)."""

    @model_validator(mode="after")
    def _fits(self) -> "ClassificationSection":
        if self.problem_type != "single_label" and (self.class_weights is not None or self.label_smoothing):
            raise ValueError(f"class_weights and label_smoothing are for single_label, not for {self.problem_type}")
        if self.problem_type == "regression" and self.labels:
            raise ValueError("regression predicts a number: leave labels out")
        if isinstance(self.class_weights, dict) and self.labels and set(self.class_weights) != set(self.labels):
            raise ValueError("class_weights must name each of the labels once")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names a class twice")
        return self


class ImageSection(Section):
    """Of the tasks that read images: size, colour scale and augmentation."""

    size: int | None = Field(default=None, ge=2)
    """Pixels a side; default: the pretrained model's, or `image_size` of its config, or 224."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel (of 0 to 1); default: the pretrained model's, or 0.5."""
    std: tuple[float, ...] | None = None
    """Then divided by; default: the pretrained model's, or 0.5."""
    random_resized_crop: tuple[float, float] | None = None
    """Train on a random part of this share of the area (`[0.08, 1.0]`), scaled to the whole size."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left to right while training."""
    color_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Brightness, contrast and saturation change by up to this share while training."""
    mixup_alpha: float = Field(default=0.0, ge=0)
    """Mix pairs of images and their targets (Zhang et al., arXiv 1710.09412), by a share from Beta(alpha, alpha)."""
    cutmix_alpha: float = Field(default=0.0, ge=0)
    """Paste a box of another image and mix the targets by its area (Yun et al., arXiv 1905.04899)."""

    @model_validator(mode="after")
    def _fits(self) -> "ImageSection":
        if self.mixup_alpha and self.cutmix_alpha:
            raise ValueError("set mixup_alpha or cutmix_alpha, not both")
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError("random_resized_crop needs 0 < smallest share <= largest share <= 1")
        return self


class AudioSection(Section):
    """Of `audio_classification`: the waves that the model reads."""

    sampling_rate: int | None = Field(default=None, ge=1)
    """Samples a second; sounds of another rate are resampled. Default: the pretrained model's, or 16,000."""
    max_seconds: float = Field(default=10.0, gt=0)
    """Of a longer sound the beginning is read."""
    normalize: bool | None = None
    """Scale each wave to mean 0 and variance 1; default: as the pretrained model's, or yes."""


class AdapterSection(Section):
    """Train a few added weights and leave the model's own as they are (`peft`)."""

    method: Literal["lora", "rslora", "dora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning"]
    """LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732), DoRA (2402.09353), IA3 (2205.05638), prefix tuning
    (2101.00190), prompt tuning (2104.08691), P-tuning (2103.10385)."""
    r: int = Field(default=8, ge=1)
    """Rank, of the LoRA methods."""
    lora_alpha: float = Field(default=16, gt=0)
    """Scale: updates are multiplied by lora_alpha / r (rsLoRA: by lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices."""
    target_modules: tuple[str, ...] = ()
    """Ends of the names of the modules that get weights (`q_proj`); default: peft's choice for the family."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and saved whole besides; the head of a classifier always is."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """Length of the learnt prefix or prompt."""

    @property
    def is_prompt(self) -> bool:
        """Whether it puts something before the text, so that it cannot be merged into the model."""
        return self.method in ("prefix_tuning", "prompt_tuning", "p_tuning")

    @model_validator(mode="after")
    def _fits(self) -> "AdapterSection":
        if self.is_prompt and self.target_modules:
            raise ValueError(f"{self.method} changes no module: leave target_modules out")
        return self


class MaskedLanguageModellingSection(Section):
    """Of `masked_lm`: which tokens are hidden (BERT, Devlin et al., arXiv 1810.04805), anew in every epoch."""

    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of each sample's tokens to predict."""
    replace_by_mask: float = Field(default=0.8, ge=0, le=1)
    """Share of those that the mask token replaces."""
    replace_by_random: float = Field(default=0.1, ge=0, le=1)
    """Share of those that a random token replaces; the rest stay as they are."""
    whole_word: bool = False
    """Hide all tokens of a word or none."""
    next_sentence: bool = False
    """Predict besides whether a sample's second part follows its first one, as BERT does."""

    @model_validator(mode="after")
    def _shares(self) -> "MaskedLanguageModellingSection":
        if self.replace_by_mask + self.replace_by_random > 1 + 1e-9:
            raise ValueError("replace_by_mask and replace_by_random together are more than 1")
        return self


class SequenceToSequenceSection(Section):
    """Of `seq2seq_lm`."""

    source_prefix: str = ""
    """Put before each source, such as T5's `summarize: `."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all tokens, while training."""
    metrics: tuple[Literal["bleu", "chrf", "rouge"], ...] = ()
    """Let the model write a text for each held-out source, always its most probable next token, and compare it with the
    target: BLEU and chrF (0 to 100, sacrebleu's defaults), ROUGE-1, -2 and -L (0 to 1, F measure, without stemming)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens to write at most."""


class PreferenceSection(Section):
    """Of `preference`: how a model learns which of two answers is the better one."""

    method: Literal["dpo", "ipo", "orpo", "simpo"] = "dpo"
    """DPO (arXiv 2305.18290), IPO (2310.12036; log-probabilities averaged over tokens), ORPO (2403.07691), SimPO
    (2405.14734). The first two compare with the model as it was: with an adapter, the model without it; otherwise a
    copy that every worker holds whole."""
    beta: float = Field(default=0.1, gt=0)
    """Strength: of staying near the reference (DPO, IPO), of the odds ratio (ORPO), of the difference (SimPO)."""
    gamma: float = Field(default=0.5, ge=0)
    """Margin that SimPO asks for."""


class DistillationSection(Section):
    """Learn from a teacher besides the true targets (`causal_lm` and `sequence_classification`)."""

    teacher_name_or_path: str
    """Folder or hub name of the teacher: a model of the same kind with the same tokens, or the same classes. Every
    worker holds it whole."""
    temperature: float = Field(default=2.0, gt=0)
    """Both models' logits are divided by it."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher in the loss; the rest is that of the true targets."""


class KtoSection(Section):
    """Of `kto`: how a model learns from answers that are called good or bad (arXiv 2402.01306)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of staying near the reference: the model without its adapter, or a copy of it on every worker."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of a good answer's loss."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of a bad one's. Between the sums of both kinds' weights 1:1 to 4:3 is advised."""


class EmbeddingSection(Section):
    """Of `sentence_embedding`."""

    temperature: float = Field(default=0.05, gt=0)
    """Cosines are divided by it before the softmax."""
