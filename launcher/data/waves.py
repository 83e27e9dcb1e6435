"""WAV files to waves of one channel at one sampling rate."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNKNOWN_LENGTHS = (0, 0xFFFFFFFF)
"""What recorders write for the length of a file before they know it."""
_VARIANCE_FLOOR = 1e-7


def read_wave(audio: Any, rate: int) -> NDArray[np.float32]:
    """Decode a sound to float32 [samples], about -1 to 1: the mean of its channels, resampled to `rate`.

    Args:
        audio: `bytes` (or a `path`) of a WAV file, as `datasets` has them; or an `array` with its `sampling_rate`.
        rate: samples a second of the result.

    Raises:
        OSError, ValueError: it is no whole WAV file of plain samples.
    """
    from scipy.signal import resample_poly

    if audio.get("array") is not None:
        own_rate, samples = int(audio["sampling_rate"]), np.asarray(audio["array"])
    else:
        own_rate, samples = _decoded(audio)
    wave = _as_floats(samples)
    if wave.ndim > 1:
        wave = wave.mean(axis=1)
    if not len(wave) or not np.isfinite(wave).all():
        raise ValueError("it holds no samples, or some that are no numbers")
    if own_rate != rate:
        common = math.gcd(own_rate, rate)
        wave = resample_poly(wave, rate // common, own_rate // common)
    return wave.astype(np.float32)


def _decoded(audio: Any) -> tuple[int, NDArray[Any]]:
    from scipy.io import wavfile

    content, path = audio.get("bytes"), audio.get("path")
    if content is None and not path:
        raise ValueError("there is neither a sound nor a path to one")
    if content is None:
        content = Path(path).read_bytes()
    length = int.from_bytes(content[4:8], "little")
    if length not in _UNKNOWN_LENGTHS and length + 8 > len(content):
        raise ValueError("the file is cut short")  # scipy would return what there is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no samples
        try:
            rate, samples = wavfile.read(io.BytesIO(content))
        except Exception as error:  # besides ValueError, whatever struct and numpy raise over broken headers
            raise ValueError(f"it is no WAV file of plain samples: {error}") from error
    return int(rate), samples


def _as_floats(samples: NDArray[Any]) -> NDArray[np.float64]:
    """Whole numbers to -1 to 1; those of 8 bits are unsigned, those of 24 come in the upper part of 32."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float64)


def normalized(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean 0 and variance 1, as transformers' `Wav2Vec2FeatureExtractor` makes waves with `do_normalize`."""
    scaled: NDArray[np.float32] = ((wave - wave.mean()) / np.sqrt(wave.var() + _VARIANCE_FLOOR)).astype(np.float32)
    return scaled
