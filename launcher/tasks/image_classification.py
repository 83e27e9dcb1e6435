"""Image classification: any `AutoModelForImageClassification` on image folders or data sets with an image column."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageClassification
from xxhash import xxh3_128_hexdigest

from launcher.data.examples import BadExample, Example, Field, Row
from launcher.models.build import build_config
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.augmentation import mix, model_pixels
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.classification import (
    Labels,
    class_weights,
    classification_answers,
    classification_loss,
    classification_metrics,
    is_counted,
    shown_answers,
)
from launcher.tasks.distillation import Distillation
from launcher.tasks.sequence_classification import with_labels

DEFAULT_SIZE = 224
STORED_SHARE = 8 / 7
"""Images are kept this much larger than the model reads them when training crops at random (256 for 224)."""


class ImageInput:
    """Pictures as a recipe's model reads them: decoded, scaled and cut to squares."""

    def __init__(self, recipe: Recipe) -> None:
        form = image_form(recipe)
        self.size, self.channels = int(form["size"]), int(form["channels"])
        self.stored = round(self.size * STORED_SHARE) if recipe.image.random_resized_crop else self.size

    def identity(self) -> list[int]:
        """What the pixels depend on."""
        return [self.size, self.stored, self.channels]

    def digest(self, image: Any) -> str:
        """A hash of a picture, by which it is held out or not."""
        if isinstance(image, dict):
            return xxh3_128_hexdigest(image["bytes"] or str(image.get("path")).encode())
        return xxh3_128_hexdigest(np.asarray(image).tobytes())

    def field(self) -> Field:
        """Form of the pixels."""
        return Field("uint8", (self.channels, self.stored, self.stored))

    def pixels(self, image: Any) -> NDArray[np.uint8] | None:
        """Decode, scale the shorter side and crop the middle; `None` when it cannot be read."""
        try:
            return read_pixels(image, self.stored, self.channels)
        except (OSError, ValueError, SyntaxError):  # Pillow raises all three over broken files
            return None


class ImageClassificationEncoder:
    """Rows with `image` (a picture file, or uint8 of [height, width] or [height, width, channels]) and `label`."""

    roles: tuple[str, ...] = ("image", "label")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.labels = Labels(recipe.classification)
        self.section = recipe.classification
        self.image = ImageInput(recipe)

    def identity(self) -> Any:
        """Size and kind of labels."""
        return [self.section.problem_type, list(self.section.labels), *self.image.identity()]

    def texts(self, row: Row) -> list[str]:
        """A hash of the picture, by which it is held out or not."""
        return [self.image.digest(row["image"])]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Learn the labels."""
        self.labels.learn(row["label"] for rows in training_rows for row in rows)

    def fields(self) -> dict[str, Field]:
        """Pixels and the target."""
        return {"pixels": self.image.field(), "labels": self.labels.field()}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Decode, scale the shorter side and crop the middle."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        target = self.labels.encode(row["label"])
        if isinstance(target, str):
            return BadExample(target)
        pixels = self.image.pixels(row["image"])
        if pixels is None:
            return BadExample("the image cannot be read")
        return {"pixels": pixels, "labels": target}

    def facts(self) -> dict[str, Any]:
        """Classes and size."""
        return {**self.labels.facts(), "size": self.image.size, "channels": self.image.channels}


def read_pixels(image: Any, size: int, channels: int) -> NDArray[np.uint8]:
    """Decode a picture to uint8 [channels, size, size]: the shorter side scaled to `size`, the middle of the longer.

    Raises:
        OSError, ValueError, SyntaxError: it is no picture that Pillow can read.
    """
    from PIL import Image

    if isinstance(image, dict):
        if image["bytes"] is None and not image["path"]:
            raise ValueError("there is neither a picture nor a path to one")
        picture: Image.Image = Image.open(
            io.BytesIO(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
        )
    else:
        picture = Image.fromarray(np.asarray(image, np.uint8))
    picture = picture.convert("RGB" if channels == 3 else "L")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    array = np.asarray(picture.crop((left, top, left + size, top + size)), np.uint8)
    return array.reshape(size, size, channels).transpose(2, 0, 1)


def image_form(recipe: Recipe) -> dict[str, Any]:
    """Size, channels, mean and standard deviation of the images that the model reads.

    The recipe's; then those of the pretrained model's `preprocessor_config.json`; then those of the model's config.
    """
    named = recipe.model.model_name_or_path or recipe.model.config
    config = named if isinstance(named, dict) else {}
    folder = Path(named if isinstance(named, str) else "")
    stored = [path for path in (folder / "preprocessor_config.json", folder / "config.json") if path.is_file()]
    known: dict[str, Any] = {}
    for path in reversed(stored):
        known |= json.loads(path.read_text())
    config = {**known, **config}
    config = {**dict(config.get("vision_config") or {}), **config}  # of a model with an encoder of texts besides
    size = config.get("crop_size") or config.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    section, channels = recipe.image, int(config.get("num_channels", 3))
    return {
        "size": section.size or size or config.get("image_size") or DEFAULT_SIZE,
        "channels": channels,
        "mean": list(section.mean or config.get("image_mean") or [0.5] * channels),
        "std": list(section.std or config.get("image_std") or [0.5] * channels),
    }


class ImageClassification(Task):
    """A head on the pooled picture: `AutoModelForImageClassification`."""

    auto_class = AutoModelForImageClassification
    has_metrics = True

    def __init__(self, plan: Plan, facts: Any) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.classification
        self.image = plan.recipe.image
        self.weights = class_weights(self.section, facts)
        self.form = image_form(plan.recipe)
        section, labels = plan.recipe.distillation, tuple(facts.get("labels", ()))
        self.distillation = None if section is None else Distillation(plan, section, self.auto_class, labels)

    @classmethod
    def encoder(cls, recipe: Recipe) -> ImageClassificationEncoder:
        """Make the encoder of the recipe."""
        return ImageClassificationEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config with the classes' names."""
        return with_labels(build_config(self.plan), self.section.problem_type, self.facts)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack pixels, uint8 [samples, channels, stored size, stored size], and targets."""
        return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in ("pixels", "labels")}

    def num_targets(self, batch: Batch) -> int:
        """Count the images that have a label."""
        return int(is_counted(batch["labels"]).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of the images' classes; while training, of augmented images, and of mixed ones."""
        labels = batch["labels"]
        pixels = model_pixels(batch["pixels"], self.form, self.image, train=model.training)
        pixels = pixels.to(next(model.parameters()).dtype)
        mixes = model.training and bool(self.image.mixup_alpha or self.image.cutmix_alpha)
        partner: torch.Tensor | None = None
        share: torch.Tensor | float = 1.0
        if mixes:
            pixels, partner, share = mix(pixels, self.image)
        student = model(pixel_values=pixels)
        output = classification_loss(student.logits, labels, self.section, self.weights)
        if partner is not None:
            other = classification_loss(student.logits, labels[partner], self.section, self.weights)
            output = LossOutput(share * output.loss_sum + (1 - share) * other.loss_sum, output.num_targets)
        if self.distillation is None or not model.training:
            return output
        counted, inputs = is_counted(labels), {"pixel_values": pixels}
        total = self.distillation.loss(output.loss_sum, student, inputs, counted, counted[:, None].float(), {})
        return replace(output, loss_sum=total)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Measure with scikit-learn, and show some pictures with what the model takes them for."""
        found = classification_metrics(predictions, self.section, self.facts)
        shown = shown_answers(predictions, self.section, self.facts)
        pictures = {f"pictures/{index}": samples[index]["pixels"].transpose(1, 2, 0) for index in range(len(shown))}
        return replace(found, report={**found.report, "samples": shown}, pictures=pictures)

    def answers(self, predictions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """Class and probabilities of each sample."""
        return classification_answers(predictions["logits"], self.section, self.facts)
