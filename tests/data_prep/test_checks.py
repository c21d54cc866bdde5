"""Cleaning one image or mask."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_prep.checks import (
    CleanImage,
    Rejection,
    StoredFormat,
    clean_image,
    clean_mask,
    mask_values,
)
from data_prep.errors import DataError

Make = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def clean(data: bytes, short_side: int = 16) -> CleanImage | Rejection:
    return clean_image(data, short_side=short_side, max_pixels=1e4)


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
    assert isinstance(result, Rejection)
    assert result.reason.startswith("200 x 200 is more than 10000 pixels")


def test_a_thread_of_pixels_is_not_blown_up(to_bytes: Encode) -> None:
    result = clean(to_bytes(Image.new("RGB", (1, 5000)), "PNG"))
    assert isinstance(result, Rejection)
    assert result.reason.startswith("1 x 5000 is too long and thin")


def test_a_changed_image_is_stored_without_loss(make_picture: Make, to_bytes: Encode) -> None:
    picture = make_picture(0, (20, 16))
    result, image = accepted(to_bytes(picture, "BMP"))
    assert (result.changed, image.format) == (True, "WEBP")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


def test_jpeg_is_stored_in_full_colour_where_it_is_asked_for(
    make_picture: Make, to_bytes: Encode
) -> None:
    def stored(quality: int) -> bytes:
        result = clean_image(
            to_bytes(make_picture(0, (20, 16)), "BMP"),
            short_side=16,
            max_pixels=1e4,
            stored_format="jpeg",
            jpeg_quality=quality,
        )
        assert isinstance(result, CleanImage)
        return result.data

    image = Image.open(io.BytesIO(stored(95)))
    assert image.format == "JPEG"
    assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
    assert len(stored(60)) < len(stored(95))


@pytest.mark.parametrize(("stored_format", "length"), [("webp", 17_000), ("jpeg", 66_000)])
def test_an_image_too_long_for_its_format_is_stored_as_png(
    to_bytes: Encode, stored_format: StoredFormat, length: int
) -> None:
    data = to_bytes(Image.new("L", (length, 8), 99), "PNG")
    result = clean_image(data, short_side=8, max_pixels=1e6, stored_format=stored_format)
    assert isinstance(result, CleanImage)
    image = Image.open(io.BytesIO(result.data))
    assert (image.format, image.size) == ("PNG", (length, 8))


def test_a_file_of_the_stored_size_with_a_transparent_colour_is_not_kept(
    make_picture: Make, to_bytes: Encode
) -> None:
    picture = make_picture(0)
    picture.paste((1, 2, 3), (0, 0, 16, 8))
    _, image = accepted(to_bytes(picture, "PNG", transparency=(1, 2, 3)))
    assert (np.asarray(image)[:8] == 255).all()


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_a_mask_lies_on_its_image_whatever_its_orientation(
    kind: str, orientation: int, to_bytes: Encode
) -> None:
    values = np.zeros((403, 501), np.uint8)
    values[40:200, 60:330] = 1
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = to_bytes(Image.fromarray(values * 200).convert("RGB"), kind, exif=exif)
    image = clean_image(data, short_side=48, max_pixels=1e6)
    assert isinstance(image, CleanImage)
    mask = clean_mask(to_bytes(mask_of(values), "PNG"), image, num_labels=2, ignored=())
    assert isinstance(mask, bytes)
    labels = np.asarray(Image.open(io.BytesIO(mask)))
    pixels = np.asarray(Image.open(io.BytesIO(image.data)))[..., 0]
    assert labels.shape == pixels.shape == ((48, 60) if orientation < 5 else (60, 48))
    assert set(np.unique(labels)) == {0, 1}
    assert ((pixels > 100) != (labels > 0)).mean() < 0.015


def test_a_mask_over_the_limit_is_refused_unopened(to_bytes: Encode) -> None:
    result = mask_values(to_bytes(Image.new("L", (200, 200)), "PNG"), max_pixels=1e4)
    assert isinstance(result, Rejection)
    assert result.reason.startswith("mask: 200 x 200 is more than 10000 pixels")


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
