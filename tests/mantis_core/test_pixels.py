"""From an image file to pixels: what it shows, how large it may be, what is said of a bad one."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mantis_core.pixels import ImageError, cover, read_image, read_pixels
from tests.mantis_core.picture_files import FILES, deep_png, encoded, photo


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_becomes_the_picture_that_it_shows(name: str) -> None:
    data, shown = FILES[name]()
    picture = read_image(data, short_side=min(shown.size))
    assert (picture.image.mode, picture.image.size) == ("RGB", shown.size)
    difference = np.abs(np.asarray(picture.image, int) - np.asarray(shown, int))
    assert difference.mean() < (1.5 if "JPEG" in name else 0.5)
    assert not picture.image.info


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_is_resized_like_the_picture_that_it_shows(name: str) -> None:
    data, shown = FILES[name]()
    pixels = read_pixels(data, (32, 48), 40)
    scale = 40 / min(shown.size)
    size = [max(40, round(side * scale)) for side in shown.size]
    right = cover(shown.resize((size[0], size[1]), Image.Resampling.BICUBIC), (32, 48))
    left, top = (right.width - 48) // 2, (right.height - 32) // 2
    expected = np.asarray(right.crop((left, top, left + 48, top + 32)), int)
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels - expected).mean() < 1


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (
            np.float32([[0, 0.5, 1, np.nan, np.inf, -np.inf, -0.2, 1.5]]),
            [0, 128, 255, 0, 255, 0, 0, 255],
        ),
        (np.float32([[0, 40_000, 1e6, -1]]), [0, 10, 243, 0]),
        (np.int32([[0, 2**30, 2**31 - 1, -5]]), [0, 128, 255, 0]),
        (np.uint16([[0, 0, 0]]), [0, 0, 0]),
    ],
)
def test_values_without_a_depth_are_scaled_by_the_brightest(
    values: np.ndarray, levels: list[int]
) -> None:
    picture = read_image(encoded(Image.fromarray(values), "TIFF"), short_side=1)
    assert np.asarray(picture.image)[0, :, 0].tolist() == levels


def test_colours_of_12_bits_in_a_16_bit_file_are_refused_not_blackened() -> None:
    colours = np.asarray(photo()).astype(np.uint16) * 16
    with pytest.raises(ImageError, match="none is over 4095"):
        read_image(deep_png(colours), short_side=16)
    read_image(deep_png(colours * 16), short_side=16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"no image", "not an image"),
        (encoded(photo(), "JPEG")[:900], "truncated"),
        (encoded(photo())[:900], "truncated"),
        (encoded(photo(), "TIFF")[:900], "not an image|truncated|does not decode"),
        ("photo.jpg", "str is no image; give the bytes"),
        (None, "NoneType is no image; give the bytes"),
    ],
)
def test_what_is_no_image_has_the_projects_error(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(data, short_side=16)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_an_image_over_the_limit_is_refused_before_it_is_decoded(kind: str) -> None:
    data = encoded(Image.new("L", (2000, 2000)), kind)
    tracemalloc.start()
    with pytest.raises(ImageError, match="2000 x 2000 is more than 1000000 pixels; shrink"):
        read_image(data, short_side=16, max_pixels=1e6)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_turned_png_over_the_limit_is_not_decoded_for_its_orientation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.new("L", (2000, 2000)))
    monkeypatch.setattr(
        "PIL.PngImagePlugin.PngImageFile.load_prepare", lambda self: pytest.fail("decoded")
    )
    with pytest.raises(ImageError, match="more than"):
        read_image(data, short_side=16, max_pixels=1e6)


def test_a_decompression_bomb_has_the_projects_error() -> None:
    with pytest.raises(ImageError, match="more than 178956970 pixels; shrink"):
        read_image(encoded(Image.new("1", (14_000, 14_000))), short_side=64)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_thread_of_pixels_is_not_blown_up(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="too long and thin: with a short side of 1000 px"):
        read_image(encoded(Image.new("RGB", size)), short_side=1000)


def test_what_counts_of_a_large_jpeg_is_the_size_to_which_it_is_reduced() -> None:
    shown = photo(1600, 1200)
    data = encoded(shown, "JPEG", quality=98)
    picture = read_image(data, short_side=100, max_pixels=4e5)
    expected = shown.resize(picture.image.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(picture.image, int) - np.asarray(expected, int))
    assert difference.mean() < 1
    with pytest.raises(ImageError, match="1600 x 1200"):
        read_image(
            encoded(shown, "JPEG", progressive=True), short_side=100, max_pixels=4e5
        )  # a decoder holds it in full
    with pytest.raises(ImageError, match="800 x 600"):
        read_image(data, short_side=300, max_pixels=4e5)


def test_reading_a_file_needs_no_torch() -> None:
    code = "import sys, mantis_core.pixels, data_prep.checks; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_palette_file_keeps_its_first_frame() -> None:
    stream = io.BytesIO()
    first, second = photo().quantize(32), Image.new("P", photo().size)
    first.save(stream, "GIF", save_all=True, append_images=[second])
    picture = read_image(stream.getvalue(), short_side=72)
    difference = np.asarray(picture.image, int) - np.asarray(first.convert("RGB"), int)
    assert np.abs(difference).max() <= 1
