"""Audio classification: any `AutoModelForAudioClassification` that reads waves, on WAV files or an audio column."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForAudioClassification
from xxhash import xxh3_128_hexdigest

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.data.waves import normalized, read_wave
from launcher.models.build import build_config
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.classification import (
    Labels,
    class_weights,
    classification_answers,
    classification_loss,
    classification_metrics,
    is_counted,
)
from launcher.tasks.sequence_classification import with_labels

DEFAULT_RATE = 16_000


class AudioClassificationEncoder:
    """Rows with `audio` (a WAV file, or an array with its sampling rate) and `label`."""

    roles: tuple[str, ...] = ("audio", "label")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.labels = Labels(recipe.classification)
        self.section = recipe.classification
        self.form = audio_form(recipe)
        self.longest = round(recipe.audio.max_seconds * self.form["rate"])

    def identity(self) -> Any:
        """Form of the waves and kind of labels."""
        return [self.section.problem_type, list(self.section.labels), self.form, self.longest]

    def texts(self, row: Row) -> list[str]:
        """A hash of the sound, by which it is held out or not."""
        audio = _file(row["audio"]) or {}
        content = audio.get("bytes")
        if content is None:
            content = np.asarray(audio["array"]).tobytes() if audio.get("array") is not None else b""
        return [xxh3_128_hexdigest(content or str(audio.get("path")).encode())]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Learn the labels."""
        self.labels.learn(row["label"] for rows in training_rows for row in rows)

    def fields(self) -> dict[str, Field]:
        """The wave and the target."""
        return {"wave": Field("float32"), "labels": self.labels.field()}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Decode, resample, cut and normalise."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        target = self.labels.encode(row["label"])
        if isinstance(target, str):
            return BadExample(target)
        audio = _file(row["audio"])
        if audio is None:
            return BadExample("there is no sound")
        try:
            wave = read_wave(audio, int(self.form["rate"]))[: self.longest]
        except (OSError, ValueError):
            return BadExample("the sound cannot be read")
        return {"wave": normalized(wave) if self.form["normalize"] else wave, "labels": target}

    def facts(self) -> dict[str, Any]:
        """Classes, and the longest wave."""
        return {**self.labels.facts(), "longest": self.longest}


def _file(value: Any) -> Mapping[str, Any] | None:
    """A sound in the form that `datasets` has; a text is the path of a file.

    Raises:
        EncodingError: it is neither.
    """
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if value is not None and not isinstance(value, Mapping):
        raise EncodingError(f"the column of sounds holds {type(value).__name__}, neither files nor arrays with a rate")
    return value


def audio_form(recipe: Recipe) -> dict[str, Any]:
    """Sampling rate and scale of the waves that the model reads.

    The recipe's; then those of the pretrained model's `preprocessor_config.json`; then wav2vec2's own.
    """
    named, section = recipe.model.model_name_or_path, recipe.audio
    path = Path(named or "") / "preprocessor_config.json"
    known = json.loads(path.read_text()) if named and path.is_file() else {}
    return {
        "rate": section.sampling_rate or known.get("sampling_rate") or DEFAULT_RATE,
        "normalize": known.get("do_normalize", True) if section.normalize is None else section.normalize,
    }


class AudioClassification(Task):
    """A head on the mean over time: `AutoModelForAudioClassification` (wav2vec2, HuBERT, WavLM, ...)."""

    auto_class = AutoModelForAudioClassification
    has_metrics = True

    def __init__(self, plan: Plan, facts: Any) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.classification
        self.weights = class_weights(self.section, facts)
        self._form: Any = None

    @classmethod
    def encoder(cls, recipe: Recipe) -> AudioClassificationEncoder:
        """Make the encoder of the recipe."""
        return AudioClassificationEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config with the classes' names.

        No layers are dropped at random: ranks that drop different ones would wait for each other's gradients.
        """
        config = with_labels(build_config(self.plan), self.section.problem_type, self.facts)
        if hasattr(config, "layerdrop"):
            config.layerdrop = 0.0
        return config

    def build_model(self) -> torch.nn.Module:
        """Build the model; what stands for masked frames is trained only where frames are masked."""
        model = super().build_model()
        config: Any = model.config
        if not (getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0)):
            for name, parameter in model.named_parameters():
                if name.endswith("masked_spec_embed"):
                    parameter.requires_grad_(False)
        return model

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad waves, float32 [samples, length], with a mask for the models that read one.

        The others (those that normalise over time) get all waves of one length, so that what they say of a wave does
        not depend on the waves beside it.
        """
        if self._form is None:
            config = self.config()
            self._form = (reads_mask(config), shortest_wave(config))
        masked, shortest = self._form
        lengths = [len(sample["wave"]) for sample in samples]
        length = max(shortest, *lengths) if masked else max(shortest, int(self.facts["longest"]))
        waves, mask = torch.zeros(len(samples), length), torch.zeros(len(samples), length, dtype=torch.int64)
        for index, sample in enumerate(samples):
            waves[index, : lengths[index]] = torch.from_numpy(sample["wave"])
            mask[index, : lengths[index]] = 1
        batch = {"input_values": waves, "labels": torch.from_numpy(np.stack([sample["labels"] for sample in samples]))}
        return {**batch, "attention_mask": mask} if masked else batch

    def num_targets(self, batch: Batch) -> int:
        """Count the sounds that have a label."""
        return int(is_counted(batch["labels"]).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of the sounds' classes."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        inputs = {name: batch[name] for name in ("attention_mask",) if name in batch}
        with _numpy_seeded():
            logits = model(input_values=batch["input_values"].to(dtype), **inputs).logits
        return classification_loss(logits, batch["labels"], self.section, self.weights)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Measure with scikit-learn."""
        return classification_metrics(predictions, self.section, self.facts)

    def answers(self, predictions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """Class and probabilities of each sample."""
        return classification_answers(predictions["logits"], self.section, self.facts)


def reads_mask(config: Any) -> bool:
    """Whether a model was made for a mask of padded samples: not where the first layer normalises over all of them."""
    return getattr(config, "feat_extract_norm", "layer") != "group"


def shortest_wave(config: Any) -> int:
    """Samples of which the first layers make one frame, or as many frames as SpecAugment masks at once.

    A convolution of width k and stride s makes n frames of (n - 1) s + k inputs.
    """
    masks = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
    samples = int(config.mask_time_length) + 1 if masks else 1
    layers = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True)
    for kernel, stride in reversed(list(layers)):
        samples = (samples - 1) * stride + kernel
    return math.ceil(samples)


@contextmanager
def _numpy_seeded() -> Iterator[None]:
    """SpecAugment's masks out of PyTorch's generator, which the loop seeds for each step: transformers asks NumPy's."""
    state = np.random.get_state()
    np.random.seed(int(torch.randint(2**31, ())))
    try:
        yield
    finally:
        np.random.set_state(state)
