"""From an image file to what a network reads: decoding, size, normalisation. No augmentation."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 with ImageNet mean and deviation, on the images' device."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    deviation = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return ((images.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def prepare_image(data: bytes, image_size: tuple[int, int], short_side: int) -> Tensor:
    """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop.

    `image_size` is (H, W). Raises OSError or ValueError where Pillow cannot read the file.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = image_size
    scale = short_side / min(upright.size)
    if scale != 1:
        size = [max(short_side, round(side * scale)) for side in upright.size]
        upright = upright.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (upright.width - width) // 2, (upright.height - height) // 2
    if left < 0 or top < 0:
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    else:
        upright = upright.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
