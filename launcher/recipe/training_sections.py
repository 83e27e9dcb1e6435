"""Sections of a recipe about what a step is: batches, schedule, precision, optimizer."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from launcher.recipe.data_sections import Source
from launcher.recipe.section import Section


class AdversarialSection(Section):
    """Train on disturbed embeddings, or pixels, besides the true ones."""

    method: Literal["fgm", "pgd"] = "fgm"
    """One step along the gradient (Miyato et al., arXiv 1605.07725), or several projected ones (Madry et al., arXiv
    1706.06083); disturbances are measured by each sample's Euclidean norm."""
    epsilon: float = Field(default=1.0, gt=0)
    """Largest norm of a sample's disturbance."""
    steps: int = Field(default=3, ge=1)
    """Of `pgd`; each one as long as 1.5 epsilon / steps."""


class EmaSection(Section):
    """Keep an exponential moving average of the trained weights (Polyak and Juditsky 1992), in fp32."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """After each step the average is decay x average + (1 - decay) x weights; it begins with the first weights."""
    warmup: bool = False
    """Forget faster at first: the decay of step n is at most (1 + n) / (10 + n)."""
    use: bool = True
    """Evaluate and export the averaged weights; false: only keep them, for `zerofleet export --ema`."""


def _not_fp8(value: Any) -> Any:
    if value == "fp8":
        raise ValueError(
            "fp8 is not trained by a test of ours: it needs a GPU of compute capability 8.9 (Ada, Hopper) or later, "
            "and Transformer Engine or torchao; set it to bf16"
        )
    return value


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
    precision: Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_not_fp8)] = "bf16"
    """Number format of forward and backward; the optimizer's copy of the weights stays fp32."""
    torch_compile: bool = False
    """Compile each layer with torch.compile when it first runs: faster steps, after a start of seconds to minutes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    mlp_tiles: int = Field(default=1, ge=1)
    """Run each MLP over so many parts of the sequence, one after the other, and again in the backward pass (ALST, arXiv
    2506.13996): less memory for long sequences."""
    loss_tiles: int = Field(default=1, ge=1)
    """The same for output head and loss: the logits of one part at a time."""
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


class EwcSection(Section):
    """Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796): keep what an earlier task needs."""

    strength: float = Field(gt=0)
    """Before each step, weights -= learning rate x strength x Fisher x (weights - start), decoupled from the gradient
    as weight_decay is, and by at most the whole way to the start."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Data of the earlier task, in the form that this task reads."""
    samples: int = Field(default=256, ge=1)
    """At most so many of its samples, evenly spread, tell the diagonal of the Fisher information: the mean over them of
    the squared gradient of each one's summed loss, at the start, in fp32. `prepare` computes it once."""


class OptimizerSection(Section):
    """The optimizer and its constants; the learning rate and its schedule stand under `training`."""

    type: Literal["adamw", "sgd", "adafactor", "muon", "lion", "adamw_8bit"] = "adamw"
    """`adamw`: Loshchilov and Hutter, arXiv 1711.05101; `sgd`: stochastic gradient descent with momentum; `adafactor`:
    Shazeer and Stern, arXiv 1804.04235, torch's; `muon`: Jordan et al. 2024, DeepSpeed's, for the matrices of the
    layers, with AdamW for the rest; `lion`: Chen et al., arXiv 2302.06675; `adamw_8bit` is known and refused."""
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
    ewc: EwcSection | None = None
    """Keep what was learnt from earlier data; for a pretrained model that is trained whole."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment; of `lion`, of the mixture whose sign is taken."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment; of `lion`, of the momentum that is kept."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
