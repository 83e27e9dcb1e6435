"""Pictures and their texts: two encoders bring those that belong together near each other (CLIP)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

from launcher.data.examples import BadExample, Example, Field, Row
from launcher.data.store import IGNORED
from launcher.errors import RecipeError
from launcher.models.build import build_config
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.augmentation import model_pixels
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.image_classification import ImageInput, image_form
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.sentence_embedding import contrastive_loss, places_among


class ImageTextEncoder:
    """Rows with `image` (a picture file, or an array) and `text`."""

    roles: tuple[str, ...] = ("image", "text")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.image = ImageInput(recipe)
        self.length = recipe.data.sequence_length
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """Form of the pictures."""
        return self.image.identity()

    def texts(self, row: Row) -> list[str]:
        """The text."""
        return [str(row["text"] or "")]

    def split_key(self, row: Row) -> str:
        """A hash of the picture: many pictures may have one text."""
        return self.image.digest(row["image"])

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)

    def fields(self) -> dict[str, Field]:
        """Pixels, tokens, and whether the pair counts."""
        return {"pixels": self.image.field(), "input_ids": Field("uint32"), "labels": Field("int64", ())}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Decode and tokenise."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        text = str(row["text"] or "")
        if not text.strip():
            return BadExample("its text is empty")
        pixels = self.image.pixels(row["image"])
        if pixels is None:
            return BadExample("the image cannot be read")
        ids = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
        return {"pixels": pixels, "input_ids": np.array(ids, np.uint32), "labels": np.array(0, np.int64)}

    def facts(self) -> dict[str, Any]:
        """What fills up a text, what ends one, and how many tokens there are."""
        last = self.tokenizer.sep_token_id  # the end token, where there is another for padding
        return {
            "pad_token_id": padding_token(self.tokenizer),
            "end_token_id": self.tokenizer.eos_token_id if last is None else last,
            "vocab_size": len(self.tokenizer),
        }


class ImageTextContrastive(Task):
    """A dual encoder with a learnt temperature: `CLIPModel` and what is built like it (arXiv 2103.00020)."""

    auto_class = AutoModel
    has_metrics = True

    def __init__(self, plan: Plan, facts: Any) -> None:
        super().__init__(plan, facts)
        self.form = image_form(plan.recipe)

    @classmethod
    def encoder(cls, recipe: Recipe) -> ImageTextEncoder:
        """Make the encoder of the recipe."""
        return ImageTextEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config; of a new model, with the tokenizer's tokens."""
        config = build_config(self.plan)
        text = getattr(config, "text_config", None)
        if self.plan.recipe.model.config is not None and text is not None:
            text.vocab_size = self.facts["vocab_size"]
            text.pad_token_id, text.eos_token_id = self.facts["pad_token_id"], self.facts["end_token_id"]
        return config

    def build_model(self) -> torch.nn.Module:
        """Build the model.

        Its temperature, a scalar, becomes a vector of one element: DeepSpeed sends parameters to the other ranks as
        bytes (`runtime/engine.py: _broadcast_model`, `runtime/zero/partition_parameters.py: _zero_init_param`), for
        which a scalar has no view. An export has the scalar again.

        Raises:
            RecipeError: it is no dual encoder, or one that was made for another loss.
        """
        model: Any = super().build_model()
        names = {name for name, _ in model.named_parameters()}
        if "logit_scale" not in names or "logit_bias" in names:
            raise RecipeError.single(
                "model",
                f"{type(model).__name__} is no dual encoder with a softmax over pairs; take one such as CLIP "
                "(model_type: clip)",
            )
        scale = model.logit_scale
        model.logit_scale = torch.nn.Parameter(scale.detach().view(1), requires_grad=scale.requires_grad)
        whole: torch.nn.Module = model
        return whole

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack pixels, uint8 [samples, channels, side, side], and pad the texts."""
        pixels = torch.from_numpy(np.stack([sample["pixels"] for sample in samples]))
        labels = torch.tensor([int(sample["labels"]) for sample in samples])
        return {**pad(samples, "input_ids", self.facts["pad_token_id"]), "pixels": pixels, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        """Count the pairs."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The mean of both directions' cross-entropies, summed over pairs, in fp32.

        A picture's text is sought among the texts of the micro batches of all ranks together, and a text's picture too;
        see `contrastive_loss`.
        """
        pixels = model_pixels(batch["pixels"], self.form, self.plan.recipe.image, train=model.training)
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels.to(dtype)
        )
        images, texts = output.image_embeds.float(), output.text_embeds.float()
        temperature = temperature_of(output.logits_per_text.float(), texts @ images.T)
        counted = batch["labels"] != IGNORED
        loss_sum = contrastive_loss(images, [texts], counted, temperature)
        loss_sum = (loss_sum + contrastive_loss(texts, [images], counted, temperature)) / 2
        return LossOutput(loss_sum, counted.sum(), predictions={"image": images.detach(), "text": texts.detach()})

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """How well each picture's text is found among all texts of the evaluation, and the other way round.

        A text that is the same as a picture's own one is no nearer than it.
        """
        images, texts = (np.stack([each[name] for each in predictions]) for name in ("image", "text"))
        values = {}
        for name, anchors, candidates in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            ranks = places_among(anchors, candidates)
            values[f"{name}_mean_reciprocal_rank"] = float((1 / (ranks + 1)).mean())
            values |= {f"{name}_recall_at_{k}": float((ranks < k).mean()) for k in (1, 5)}
        return Metrics(values)


def temperature_of(logits: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """By what a model has divided cosines to make logits; its gradient is the temperature's alone.

    The parameter itself cannot be asked: ZeRO 3 takes it away when the model's forward pass is over.
    """
    return cosines.square().sum() / (logits * cosines).sum()
