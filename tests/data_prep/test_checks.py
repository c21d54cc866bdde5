"""Cleaning one image or mask."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_prep.checks import CleanImage, Rejection, clean_image, clean_mask
from data_prep.errors import DataError

Make = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def clean(data: bytes, short_side: int = 16) -> CleanImage | Rejection:
    return clean_image(data, short_side=short_side, jpeg_quality=95, max_pixels=1e4)


def accepted(data: bytes, short_side: int = 16) -> tuple[CleanImage, Image.Image]:
    result = clean(data, short_side)
    assert isinstance(result, CleanImage), result
    image = Image.open(io.BytesIO(result.data))
    image.load()
    assert image.size == (result.width, result.height)
    assert image.mode == "RGB"
    return result, image


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_clean_image_keeps_its_bytes(make_picture: Make, to_bytes: Encode, kind: str) -> None:
    data = to_bytes(make_picture(0, (20, 16)), kind)
    result, _ = accepted(data)
    assert result.data == data
    assert not result.changed


def test_a_large_image_is_reduced_to_the_short_side(make_picture: Make, to_bytes: Encode) -> None:
    _, image = accepted(to_bytes(make_picture(0, (100, 80))))
    assert image.size == (20, 16)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "1", "LA", "I;16"])
def test_every_colour_mode_becomes_rgb(make_picture: Make, to_bytes: Encode, mode: str) -> None:
    image = make_picture(0, (3, 3)).resize((16, 16))  # smooth: JPEG keeps it
    if mode == "I;16":
        levels = np.asarray(image.convert("L")).astype(np.uint16) * 257
        data, expected = to_bytes(Image.fromarray(levels), "PNG"), image.convert("L")
    else:
        data = to_bytes(image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
        expected = image.convert(mode)
    _, result = accepted(data)
    difference = np.abs(
        np.asarray(result, int) - np.asarray(expected.convert("RGBA").convert("RGB"), int)
    )
    assert difference.mean() < 25


def test_a_rotated_image_is_turned_upright(to_bytes: Encode) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # the left half is white; turned clockwise it is the upper half
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _, image = accepted(to_bytes(Image.fromarray(pixels), exif=exif))
    turned = np.asarray(image)
    assert turned.shape == (32, 16, 3)
    assert turned[:14].mean() > 240
    assert turned[18:].mean() < 15
    assert image.getexif().get(ExifTags.Base.Orientation) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"not an image at all", "not an image"),
        (lambda data: data[: len(data) // 2], "truncated"),
    ],
)
def test_an_unreadable_image_is_refused_with_its_reason(
    make_picture: Make, to_bytes: Encode, damage: Callable[[bytes], bytes], reason: str
) -> None:
    for kind in ("JPEG", "PNG"):
        assert clean(damage(to_bytes(make_picture(0), kind))) == Rejection(reason)


def test_a_decompression_bomb_is_refused_unopened(to_bytes: Encode) -> None:
    result = clean(to_bytes(Image.new("L", (200, 200)), "PNG"))
    assert result == Rejection("200 x 200 is more than 10000 pixels")


def test_a_thread_of_pixels_is_not_blown_up(to_bytes: Encode) -> None:
    result = clean(to_bytes(Image.new("RGB", (1, 5000)), "PNG"))
    assert result == Rejection("1 x 5000 is too long and thin")


def mask_of(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def test_a_mask_follows_its_image(make_picture: Make, to_bytes: Encode) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image, _ = accepted(to_bytes(make_picture(0, (64, 32)), exif=exif))
    values = np.zeros((32, 64))
    values[:, :32] = 2
    mask = clean_mask(to_bytes(mask_of(values), "PNG"), image, num_labels=3, ignored=())
    assert isinstance(mask, bytes)
    turned = np.asarray(Image.open(io.BytesIO(mask)))
    assert turned.shape == (32, 16)
    assert (turned[:16] == 2).all()
    assert (turned[16:] == 0).all()


def test_ignored_mask_values_become_255(make_picture: Make, to_bytes: Encode) -> None:
    image, _ = accepted(to_bytes(make_picture(0)))
    values = np.full((16, 16), 11)
    values[0] = 1
    mask = clean_mask(to_bytes(mask_of(values), "PNG"), image, num_labels=2, ignored=(11,))
    assert isinstance(mask, bytes)
    assert set(np.unique(np.asarray(Image.open(io.BytesIO(mask))))) == {1, 255}


def test_a_mask_value_outside_its_labels_is_the_users_mistake(
    make_picture: Make, to_bytes: Encode
) -> None:
    image, _ = accepted(to_bytes(make_picture(0)))
    data = to_bytes(mask_of(np.full((16, 16), 7)), "PNG")
    with pytest.raises(DataError, match=r"mask value 7 is outside its labels 0\.\.4"):
        clean_mask(data, image, num_labels=5, ignored=())


def test_a_mask_of_another_size_is_refused(make_picture: Make, to_bytes: Encode) -> None:
    image, _ = accepted(to_bytes(make_picture(0)))
    result = clean_mask(to_bytes(mask_of(np.zeros((8, 9))), "PNG"), image, num_labels=2, ignored=())
    assert isinstance(result, Rejection)
    assert "does not fit" in result.reason
