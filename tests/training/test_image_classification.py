"""Image classification: pictures of any kind to pixels, transformers' loss, augmentation, unreadable files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from launcher.errors import SourceError
from launcher.recipe.task_sections import ImageSection
from launcher.tasks import make_task
from launcher.tasks.augmentation import augment, mix
from launcher.tasks.image_classification import read_pixels
from tests.support.ranks import Ranks
from tests.training.task_runs import run_of, write_recipe

VIT = (
    "{model_type: vit, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4, "
    "image_size: 16, patch_size: 4, num_channels: 1, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
)


def make(folder: Path, source: dict[str, Any], *overrides: str, **sections: Any) -> Any:
    recipe = write_recipe(folder, "image_classification", f"{{config: {VIT}}}", [source], **sections)
    return run_of(recipe, folder / "run", *overrides)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits 0 to 3 as PNG files, one folder a class."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits(n_class=4)
    for index, (image, target) in enumerate(zip(digits.images[:150], digits.target[:150], strict=True)):
        (folder / str(target)).mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / str(target) / f"{index:03}.png")
    return folder


def test_the_loss_is_that_of_transformers(tmp_path, pictures) -> None:
    _, plan, prepared = make(tmp_path, {"type": "image_folder", "files": [f"{pictures}/*/*.png"]})
    assert prepared.facts["labels"] == ["0", "1", "2", "3"]
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(5)])
    assert batch["pixels"].shape == (5, 1, 16, 16)
    output = task.loss(model, batch)
    pixels = (batch["pixels"].float() / 255 - 0.5) / 0.5
    expected = model(pixel_values=pixels, labels=batch["labels"]).loss
    assert (output.loss_sum / 5).item() == pytest.approx(expected.item(), abs=1e-5)
    assert int(output.num_targets) == task.num_targets(batch) == 5


def test_pictures_of_any_shape_and_mode_become_pixels(tmp_path) -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (read_pixels(wide, 10, 1) == 200).all(), "the middle is kept"
    Image.fromarray(wide).convert("RGBA").save(tmp_path / "a.png")
    pixels = read_pixels({"bytes": None, "path": str(tmp_path / "a.png")}, 5, 3)
    assert pixels.shape == (3, 5, 5)
    assert (pixels == 200).mean() > 0.5


def test_unreadable_pictures_are_counted_and_left_out_up_to_a_bound(tmp_path, pictures) -> None:
    broken = tmp_path / "pictures" / "0"
    broken.mkdir(parents=True)
    (broken / "no.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (broken / "cut.png").write_bytes(next(pictures.glob("0/*.png")).read_bytes()[:60])
    source = {"type": "image_folder", "files": [f"{pictures}/*/*.png", f"{tmp_path}/pictures/*/*.png"]}
    with pytest.raises(SourceError, match=r"2 of 152 examples cannot be used: 2 x the image cannot be read"):
        make(tmp_path, source)
    _, _, prepared = make(tmp_path, source, "data.max_bad_fraction=0.02")
    assert prepared.statistics["sources"][0]["bad_examples"] == 2
    assert sum(len(part) for name in ("train", "validation") for part in prepared.split(name)) == 150


def test_text_files_are_no_pictures(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(SourceError, match="type text has text, but the task also reads image and label"):
        make(tmp_path, {"type": "text", "files": [f"{tmp_path}/*.txt"]})


def test_augmentation_keeps_what_it_should() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32).contiguous()
    whole = augment(ramp, 32, ImageSection(random_resized_crop=(1.0, 1.0)))
    assert whole.shape == (64, 3, 32, 32)
    cropped = augment(ramp, 16, ImageSection(random_resized_crop=(0.25, 0.25)))
    spread = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    # A quarter of the area is half a side, by 3:4 to 4:3: sqrt(3/4)/2 to sqrt(4/3)/2 of the ramp, less half a pixel.
    assert spread.min() > 0.40
    assert spread.max() < 0.59
    assert (cropped[:, 0, 0] - cropped[:, 0, -1]).abs().max() < 1e-5, "rows stay rows"
    mirrored = augment(ramp, 32, ImageSection(horizontal_flip=0.5))
    share = (mirrored[:, 0, 0, 0] > 0.5).float().mean()
    assert 0.3 < share < 0.7
    assert torch.equal(augment(ramp, 32, ImageSection()), ramp)
    jittered = augment(ramp, 32, ImageSection(color_jitter=0.4))
    assert 0 <= jittered.min() < jittered.max() <= 1
    assert jittered.std(dim=0).max() > 0.02


@pytest.mark.parametrize("section", [ImageSection(mixup_alpha=0.4), ImageSection(cutmix_alpha=0.4)])
def test_mixed_images_have_the_share_that_is_said(section) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        images = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 8, 8).contiguous()  # image i is all in channel i
        mixed, partner, share = mix(images, section)
        for index in range(6):
            means = mixed[index].mean(dim=(1, 2))
            own = float(means[index])
            if partner[index] != index:
                assert own == pytest.approx(float(share), abs=1e-6)
                assert float(means[partner[index]]) == pytest.approx(1 - float(share), abs=1e-6)
            else:
                assert own == pytest.approx(1.0)


@pytest.mark.distributed
def test_it_learns_digits_while_images_are_mixed(tmp_path, two_ranks: Ranks) -> None:
    directory, _, prepared = make(
        tmp_path,
        {"type": "sklearn", "name": "digits"},
        "training.max_steps=200",
        "training.learning_rate=1e-2",
        "training.micro_batch_size=16",
        "image.mixup_alpha=0.2",
        "evaluation.max_eval_samples=151",
    )
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    metrics = results[0]["metrics"]
    assert metrics["eval_targets"] == 151
    assert metrics["eval_accuracy"] > metrics["eval_majority_accuracy"] + 0.3
