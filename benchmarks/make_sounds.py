"""Sounds to learn from where nothing can be downloaded: four kinds of waves, each sound of its own pitch and loudness.

    python benchmarks/make_sounds.py [FOLDER] [--count 200]

writes FOLDER/{sine,square,sawtooth,noise}/*.wav, where `recipes/finetune/audio-classification.yaml` looks for them.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal
from scipy.io import wavfile

RATE = 8_000
SECONDS = 0.4
KINDS = ("sine", "square", "sawtooth", "noise")


def wave(kind: str, generator: np.random.Generator) -> NDArray[np.int16]:
    """One sound: pitch, phase, loudness and envelope at random, and noise at 10 to 20 dB below it."""
    time = np.arange(round(RATE * SECONDS * generator.uniform(0.6, 1.0))) / RATE
    phase = 2 * np.pi * (generator.uniform(150, 600) * time + generator.uniform())
    shapes = {"sine": np.sin, "square": signal.square, "sawtooth": signal.sawtooth}
    samples = shapes[kind](phase) if kind in shapes else generator.uniform(-1, 1, len(time))
    samples = samples + generator.normal(0, generator.uniform(0.1, 0.3), len(time)) * np.std(samples)
    samples = samples * np.exp(-time * generator.uniform(0, 6)) * generator.uniform(0.05, 0.5)
    whole: NDArray[np.int16] = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
    return whole


def write_sounds(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` sounds of each kind."""
    generator = np.random.default_rng(seed)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            wavfile.write(folder / kind / f"{number:04d}.wav", RATE, wave(kind, generator))


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ZEROFLEET_ASSETS", "/var/tmp/zerofleet-assets")) / "sounds"  # as in the recipe
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    parser.add_argument("--count", type=int, default=200, help="sounds of each kind")
    arguments = parser.parse_args()
    write_sounds(arguments.folder, arguments.count)
    print(f"{arguments.count} sounds of each kind -> {arguments.folder}")


if __name__ == "__main__":
    main()
