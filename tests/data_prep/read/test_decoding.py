"""Decoding one image with its masks: crops and mirroring."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.read.decoding import Decoder, crop_box
from data_prep.reading import Augmentation, ReadingConfig


@pytest.mark.parametrize("augmentation", ["none", "padded_crop", "random_resized_crop"])
@pytest.mark.parametrize("stored", [(24, 16), (16, 24), (12, 40)])
def test_an_image_and_its_mask_are_cut_alike(
    augmentation: Augmentation, stored: tuple[int, int]
) -> None:
    decoder = Decoder((16, 16), 1, ("m",), ReadingConfig(augmentation=augmentation), (0, 0))
    left = np.zeros((stored[1], stored[0]), np.uint8)
    left[:, : stored[0] // 3] = 200
    image = Image.merge("RGB", [Image.fromarray(left)] * 3)
    for row_id in range(8):
        pixels, masks = decoder.view(image, {"m": Image.fromarray(left)}, row_id)
        assert pixels.shape == (16, 16, 3)
        agree = (pixels[..., 0] > 100) == (masks["m"] > 100)
        assert agree.mean() > 0.9


def test_random_crops_keep_the_asked_area_and_stay_inside() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(random, (40, 30), 0.35)
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 30
        assert (right - left) * (bottom - top) >= 0.35 * 40 * 30 - 1e-6


@pytest.mark.parametrize("padding", [0, 3, 8, 20, 100])
def test_a_padded_crop_mirrors_at_the_edges_however_wide_the_padding(padding: int) -> None:
    side = 8
    reading = ReadingConfig(crop_padding=padding, flip=False)
    pixels = np.arange(side * side, dtype=np.uint8).reshape(side, side)
    image = Image.merge("RGB", [Image.fromarray(pixels)] * 3)
    padded = np.pad(pixels, padding, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    for row_id in range(10):
        cut, _ = Decoder((side, side), 1, (), reading, (0, 0)).view(image, {}, row_id)
        assert (windows == cut[..., 0]).all(axis=(2, 3)).any(), row_id


def test_without_augmentation_the_centre_is_cut_whatever_the_settings() -> None:
    pixels = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24).astype(np.uint8)
    image = Image.merge("RGB", [Image.fromarray(pixels)] * 3)
    for reading in (ReadingConfig(), ReadingConfig(augmentation="random_resized_crop")):
        cut, _ = Decoder((16, 16), 1, (), reading, None).view(image, {}, 7)
        np.testing.assert_array_equal(cut[..., 0], pixels[:, 4:20])
