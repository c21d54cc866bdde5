"""Decoding one image with its masks: crops and mirroring."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.read.decoding import Decoder, _nearest, crop_box
from data_prep.reading import Augmentation, ReadingConfig


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def opened(decoder: Decoder, image: Any, mask: Any) -> Any:
    return decoder.opened(png(image), {"m": png(mask)})


def view(decoder: Decoder, pixels: Any, masks: Any, row_id: int) -> tuple[Any, Any]:
    """The image (3, H, W) and the masks that a decoder makes of an opened row."""
    image = np.zeros((3, *decoder.size), np.uint8)
    return image, decoder.view(pixels, masks, row_id, image)


@pytest.mark.parametrize("augmentation", ["none", "padded_crop", "random_resized_crop"])
@pytest.mark.parametrize("stored", [(24, 16), (16, 24), (12, 40)])
def test_an_image_and_its_mask_are_cut_alike(
    augmentation: Augmentation, stored: tuple[int, int]
) -> None:
    decoder = Decoder((16, 16), 1, ("m",), ReadingConfig(augmentation=augmentation), (0, 0))
    left = np.zeros((stored[1], stored[0]), np.uint8)
    left[:, : stored[0] // 3] = 200
    image = np.stack([left] * 3, axis=2)
    for row_id in range(8):
        pixels, masks = view(decoder, *opened(decoder, image, left), row_id)
        assert pixels.shape == (3, 16, 16)
        agree = (pixels[0] > 100) == (masks["m"] > 100)
        assert agree.mean() > 0.9


def test_random_crops_keep_the_asked_area_and_stay_inside() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        box = crop_box(random, (300, 400), 0.35)
        assert 0 <= box.left < box.left + box.width <= 400
        assert 0 <= box.top < box.top + box.height <= 300
        assert box.width * box.height >= 0.99 * 0.35 * 400 * 300
        assert 0.99 * 3 / 4 <= box.width / box.height <= 1.01 * 4 / 3


@pytest.mark.parametrize("padding", [0, 3, 8, 20, 100])
def test_a_padded_crop_mirrors_at_the_edges_however_wide_the_padding(padding: int) -> None:
    side = 8
    reading = ReadingConfig(crop_padding=padding, flip=False)
    pixels = np.arange(side * side, dtype=np.uint8).reshape(side, side)
    image = np.stack([pixels] * 3, axis=2)
    padded = np.pad(pixels, padding, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    for row_id in range(10):
        cut, _ = view(Decoder((side, side), 1, (), reading, (0, 0)), image, {}, row_id)
        assert (windows == cut[0]).all(axis=(2, 3)).any(), row_id


def test_without_augmentation_the_centre_is_cut_whatever_the_settings() -> None:
    pixels = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24).astype(np.uint8)
    image = np.stack([pixels] * 3, axis=2)
    for reading in (ReadingConfig(), ReadingConfig(augmentation="random_resized_crop")):
        cut, _ = view(Decoder((16, 16), 1, (), reading, None), image, {}, 7)
        np.testing.assert_array_equal(cut[0], pixels[:, 4:20])


def test_crops_are_scaled_as_pillow_scales_them() -> None:
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8)).resize((60, 48))
    reading = ReadingConfig(augmentation="random_resized_crop", flip=False)
    for row_id in range(8):
        box = crop_box(after_the_mirror(row_id), (48, 60), reading.min_crop_area)
        area = (box.left, box.top, box.left + box.width, box.top + box.height)
        theirs = smooth.crop(area).resize((32, 40), Image.Resampling.BICUBIC)
        decoder = Decoder((40, 32), 1, (), reading, (0, 0))
        ours, _ = view(decoder, np.asarray(smooth), {}, row_id)
        assert (
            np.abs(ours.transpose(1, 2, 0).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
        )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux")
def test_a_reading_thread_starts_no_threads_of_its_own() -> None:
    script = """
import os, numpy as np, torch
from data_prep.read.decoding import Decoder
from data_prep.reading import ReadingConfig
torch.set_num_threads(4)
reading = ReadingConfig(augmentation="random_resized_crop")
pixels = np.zeros((300, 280, 3), np.uint8)
def threads():
    return len(os.listdir("/proc/self/task"))
def decode(side):
    for row_id in range(8):
        image = np.zeros((3, side, side), np.uint8)
        Decoder((side, side), 1, (), reading, (0, 0)).view(pixels, {}, row_id, image)
decode(8)
before = threads()
decode(224)
assert threads() == before, f"{threads()} threads instead of {before}"
torch.zeros(3, 224, 224, dtype=torch.uint8).transpose(0, 2).contiguous()
assert threads() > before, "PyTorch starts none for a large copy: the count shows nothing"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def after_the_mirror(row_id: int) -> np.random.Generator:
    """The random numbers of a row of seed 0 and epoch 0. Nothing is drawn where nothing flips."""
    return np.random.default_rng([0, 0, row_id])


def test_a_mask_keeps_its_values_when_it_is_scaled() -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    large = mask.repeat(3, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(_nearest(mask, (9, 8)), large)
    np.testing.assert_array_equal(_nearest(large, (3, 4)), mask)
