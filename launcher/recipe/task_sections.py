"""Settings of single kinds of training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

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


class AdaLoraSection(Section):
    """Of AdaLoRA (Zhang et al., arXiv 2303.10512): how the ranks come down to `adapter.r` on average."""

    init_r: int | None = Field(default=None, ge=2)
    """Rank of each matrix at first; default: one and a half times adapter.r."""
    initial_steps: int | None = Field(default=None, ge=0)
    """Steps before any rank is taken away; default: a tenth of all steps."""
    final_steps: int | None = Field(default=None, ge=0)
    """Steps at the end in which the ranks stay as they are; default: three tenths of all steps."""
    interval: int = Field(default=1, ge=1)
    """Steps between two decisions which ranks are left."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the loss that keeps each matrix's directions orthogonal; added to the training loss."""


def _refused_adapter(value: Any) -> Any:
    if value == "qlora":
        raise ValueError(
            "qlora is not trained by a test of ours: it needs the package bitsandbytes, whose 4-bit matrices take a "
            "GPU and which ZeRO 3 cannot partition; set it to lora, with training.precision bf16"
        )
    if value in ("bottleneck", "houlsby", "pfeiffer"):
        raise ValueError(f"peft has no {value} adapter; set it to lora, or another method of peft's")
    return value


AdapterMethod = Literal["lora", "rslora", "dora", "adalora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning"]


class AdapterSection(Section):
    """Train a few added weights and leave the model's own as they are (`peft`)."""

    method: Annotated[AdapterMethod, BeforeValidator(_refused_adapter)]
    """LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732), DoRA (2402.09353), AdaLoRA (2303.10512), IA3
    (2205.05638), prefix tuning (2101.00190), prompt tuning (2104.08691), P-tuning (2103.10385)."""
    adapter_name_or_path: str | None = None
    """Begin with the weights of this adapter, a folder of peft's or a hub name: of the same method, shape and scale.
    For an adapter on top of another one, merge that: its run's export is the whole model."""
    r: int = Field(default=8, ge=1)
    """Rank, of the LoRA methods; of AdaLoRA, the mean over all matrices in the end."""
    adalora: AdaLoraSection = AdaLoraSection()
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
    def initial_rank(self) -> int:
        """Rank that AdaLoRA begins with."""
        return self.adalora.init_r or max(self.r + 1, self.r * 3 // 2)

    @property
    def is_prompt(self) -> bool:
        """Whether it puts something before the text, so that it cannot be merged into the model."""
        return self.method in ("prefix_tuning", "prompt_tuning", "p_tuning")

    @model_validator(mode="after")
    def _fits(self) -> "AdapterSection":
        if self.is_prompt and self.target_modules:
            raise ValueError(f"{self.method} changes no module: leave target_modules out")
        if self.adapter_name_or_path is not None and (self.is_prompt or self.method == "adalora"):
            raise ValueError(f"{self.method} always begins anew: leave adapter_name_or_path out")
        if self.method == "adalora" and self.initial_rank <= self.r:
            raise ValueError(f"adalora.init_r is {self.initial_rank}, and must be more than r, which is {self.r}")
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
    precompute_reference: bool = False
    """Let `prepare` compute once, in fp32, what the reference model of DPO or IPO says of each answer, and keep it with
    the data: no worker holds the reference, or runs it, while training."""

    @property
    def has_reference(self) -> bool:
        """Whether the method compares with the model as it was."""
        return self.method in ("dpo", "ipo")

    @model_validator(mode="after")
    def _fits(self) -> "PreferenceSection":
        if self.precompute_reference and not self.has_reference:
            raise ValueError(f"{self.method} compares with no reference: leave precompute_reference out")
        return self


class DistillationSection(Section):
    """Learn from a teacher too: `causal_lm`, `sequence_classification` and `image_classification`."""

    teacher_name_or_path: str
    """Folder or hub name of the teacher: a model of the same kind with the same tokens, or the same classes."""
    temperature: float = Field(default=2.0, gt=0)
    """Both models' logits are divided by it."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher in the loss; the rest is that of the true targets."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format in which the teacher computes; the losses are in fp32."""
    zero_stage: Literal[0, 3] = 0
    """0: every worker holds the teacher whole; 3: the workers hold parts of it, as under ZeRO 3."""
    precompute: bool = False
    """Let `prepare` ask the teacher once, and keep its answers with the data: training needs no teacher."""
    top_k: int = Field(default=64, ge=1)
    """Of a language model's tokens, so many of the most probable are kept by precompute at each position, and the
    probability of all others together. 8 to 10 bytes each in the cache."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared difference between both models' hidden states, layer by layer; where their widths
    differ, of a learnt projection of the student's."""
    attention_weight: float = Field(default=0.0, ge=0)
    """Weight of the squared difference between both models' attention; needs model.attn_implementation eager. Where the
    numbers of heads differ, their means are compared."""
    layers: tuple[int, ...] = ()
    """From which of the teacher's layers each of the student's learns, from 1; 0: from none. Default: evenly spread,
    the last from the last."""

    @property
    def compares_layers(self) -> bool:
        """Whether the student learns from more than the teacher's outputs."""
        return self.hidden_weight > 0 or self.attention_weight > 0

    @model_validator(mode="after")
    def _fits(self) -> "DistillationSection":
        if self.precompute and self.compares_layers:
            raise ValueError("hidden_weight and attention_weight need the teacher while training: leave precompute out")
        if self.precompute and self.zero_stage:
            raise ValueError("precompute asks a teacher that is whole in one process: set zero_stage to 0")
        if self.layers and not self.compares_layers:
            raise ValueError("layers is for hidden_weight and attention_weight: set one of them")
        return self


class KtoSection(Section):
    """Of `kto`: how a model learns from answers that are called good or bad (arXiv 2402.01306)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of staying near the reference: the model without its adapter, or a copy of it on every worker."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of a good answer's loss."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of a bad one's. Between the sums of both kinds' weights 1:1 to 4:3 is advised."""
    precompute_reference: bool = False
    """Let `prepare` compute once, in fp32, what the reference says, and keep it with the data. Each prompt then has the
    answer of the sample before it in the data, not of the one before it in its micro batch."""


class EmbeddingSection(Section):
    """Of `sentence_embedding`."""

    temperature: float = Field(default=0.05, gt=0)
    """Cosines are divided by it before the softmax."""
