"""Random changes of image batches, on the device; PyTorch's generator, which the loop seeds for each step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor

from launcher.recipe.task_sections import ImageSection

ASPECT = math.log(4 / 3)
"""Random crops have sides in proportions from 3:4 to 4:3, as in torchvision's RandomResizedCrop."""


def augment(pixels: Tensor, size: int, section: ImageSection) -> Tensor:
    """Crop, mirror and change colours at random, each image by itself.

    Args:
        pixels: [images, channels, side, side], 0 to 1.
        size: side of the result.
        section: what to do.

    Returns:
        [images, channels, size, size], 0 to 1.
    """
    count, device = len(pixels), pixels.device
    if section.random_resized_crop is not None:
        low, high = section.random_resized_crop
        area = torch.empty(count, device=device).uniform_(low, high)
        stretch = torch.empty(count, device=device).uniform_(-ASPECT, ASPECT).exp().sqrt()
        width, height = ((area.sqrt() * factor).clamp(max=1.0) for factor in (stretch, 1 / stretch))
        left, top = ((torch.rand(count, device=device) * 2 - 1) * (1 - side) for side in (width, height))
        transform = torch.zeros(count, 2, 3, device=device)
        transform[:, 0, 0], transform[:, 0, 2] = width, left
        transform[:, 1, 1], transform[:, 1, 2] = height, top
        grid = F.affine_grid(transform, [count, pixels.shape[1], size, size], align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if section.horizontal_flip:
        mirrored = torch.rand(count, device=device) < section.horizontal_flip
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    if section.color_jitter:
        brightness, contrast, saturation = torch.empty(3, count, 1, 1, 1, device=device).uniform_(
            1 - section.color_jitter, 1 + section.color_jitter
        )
        pixels = pixels * brightness
        pixels = _blend(pixels, pixels.mean(dim=(1, 2, 3), keepdim=True), contrast)
        pixels = _blend(pixels, pixels.mean(dim=1, keepdim=True), saturation).clamp(0, 1)
    return pixels


def _blend(pixels: Tensor, towards: Tensor, share: Tensor) -> Tensor:
    return pixels * share + towards * (1 - share)


def model_pixels(pixels: Tensor, form: Mapping[str, Any], section: ImageSection, *, train: bool) -> Tensor:
    """From stored images, uint8, to what the model reads; while training, augmented.

    Args:
        pixels: [images, channels, side, side].
        form: `size`, and `mean` and `std` of each channel (`image_form`).
        section: what to do to them.
        train: whether to augment.
    """
    size, pixels = int(form["size"]), pixels.float() / 255
    if train:
        pixels = augment(pixels, size, section)
    elif pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    mean, std = (
        torch.tensor(form[name], device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1) for name in ("mean", "std")
    )
    return (pixels - mean) / std


def mix(pixels: Tensor, section: ImageSection) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with another one of the batch (mixup), or paste a box of it (cutmix).

    Returns:
        The images, the index of each one's partner, and the share of its own target, a scalar.
    """
    alpha = section.mixup_alpha or section.cutmix_alpha
    share = torch.distributions.Beta(alpha, alpha).sample().to(pixels.device)
    partner = torch.randperm(len(pixels), device=pixels.device)
    if section.mixup_alpha:
        return share * pixels + (1 - share) * pixels[partner], partner, share
    height, width = pixels.shape[-2:]
    side = torch.sqrt(1 - share)
    top, bottom = _edges(height, side)
    left, right = _edges(width, side)
    pixels = pixels.clone()
    pixels[:, :, top:bottom, left:right] = pixels[partner][:, :, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return pixels, partner, torch.tensor(1 - pasted, device=pixels.device)


def _edges(length: int, share: Tensor) -> tuple[int, int]:
    center, half = int(torch.randint(length, ()).item()), int(length * share.item()) // 2
    return max(center - half, 0), min(center + half, length)
