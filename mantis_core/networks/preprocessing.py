"""From an image file to what a network reads: pixels as tensors, normalised. No augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mantis_core.pixels import MAX_PIXELS, ImageError, read_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAMED = 5  # unreadable images that a message names


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 with ImageNet mean and deviation, on the images' device."""
    compiling = torch.compiler.is_compiling()  # then the compiler keeps what is constant
    mean, deviation = (_scale if compiling else _kept_scale)(images.device)
    return ((images.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def prepare_image(
    data: bytes, image_size: tuple[int, int], short_side: int, *, max_pixels: float = MAX_PIXELS
) -> Tensor:
    """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop.

    `image_size` is (H, W). Raises ImageError for a file that does not decode, or is over the limit.
    """
    pixels = read_pixels(data, image_size, short_side, max_pixels=max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def prepare_images(files: Sequence[bytes], image_size: tuple[int, int], short_side: int) -> Tensor:
    """Image files' bytes to uint8 (B, 3, H, W), each as `prepare_image` does.

    Raises ImageError with the numbers of those that cannot be read, counted from 1, and why.
    """
    images = torch.empty((len(files), 3, *image_size), dtype=torch.uint8)
    wrong = []
    for row, data in enumerate(files):
        try:
            images[row] = prepare_image(data, image_size, short_side)
        except ImageError as error:
            wrong.append(f"image {row + 1}: {error}")
    if wrong:
        more = ["..."] if len(wrong) > NAMED else []
        raise ImageError(
            f"{len(wrong)} of {len(files)} images cannot be read; take them out or replace them "
            f"({'; '.join(wrong[:NAMED] + more)})"
        )
    return images


def _scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, float32 (1, 3, 1, 1), made on the device: a copy makes the CPU wait."""
    mean, deviation = (
        torch.cat([torch.full((1, 1, 1, 1), value, device=device) for value in values], dim=1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, deviation


_kept_scale = lru_cache(_scale)
