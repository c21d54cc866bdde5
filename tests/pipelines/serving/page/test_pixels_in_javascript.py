"""The page makes the pixels of a photograph that Pillow 13 makes, to the bit."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mantis_core.pixels import read_pixels
from tests.pipelines.serving.page.node import run_node

Pixels = NDArray[np.uint8]
Random = np.random.Generator
SCRIPT = "pixels.mjs"
RESIZED, PREPARED = 150, 100


def random_pixels(random: Random, size: list[int], channels: int) -> Pixels:
    """Noise, a gradient, black and white alone, or one grey: uint8 (H, W, channels)."""
    shape = (size[1], size[0], channels)
    kind = random.choice(["noise", "smooth", "extreme", "flat"])
    if kind == "noise":
        return random.integers(0, 256, shape, np.uint8)
    if kind == "extreme":
        found: Pixels = random.choice(np.array([0, 255], np.uint8), shape)
        return found
    if kind == "flat":
        return np.full(shape, random.integers(256), np.uint8)
    y, x, c = np.indices(shape)
    smooth: Pixels = ((3 * y + 2 * x + 50 * c) % 256).astype(np.uint8)
    return smooth


def case_of(kind: str, pixels: Pixels, **rest: Any) -> dict[str, Any]:
    height, width, _ = pixels.shape
    text = base64.b64encode(pixels.tobytes()).decode()
    return {"kind": kind, "pixels": text, "width": width, "height": height, **rest}


def bytes_of(found: list[str]) -> list[bytes]:
    assert not [each for each in found if each.startswith("Error")]
    return [base64.b64decode(each) for each in found]


def sides(random: Random, most: int) -> list[int]:
    found: list[int] = np.exp(random.uniform(0, np.log(most), 2)).astype(int).tolist()
    return found


def test_resized_pixels_are_those_of_pillow(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cases, known = [], []
    for number in range(RESIZED):
        pixels = random_pixels(random, sides(random, 300), 3)
        size = sides(random, 200)
        if number % 5 == 0:  # one side stays
            size[number % 2] = pixels.shape[1 - number % 2]
        cases.append(case_of("resize", pixels, size=size))
        image = Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        known.append(image.tobytes())
    assert bytes_of(run_node(SCRIPT, cases, tmp_path)) == known


def test_every_colour_of_every_transparency_is_put_over_white_as_pillow_does(
    tmp_path: Path,
) -> None:
    colour, alpha = np.indices((256, 256)).astype(np.uint8)
    pixels = np.stack([colour, 255 - colour, colour, alpha], axis=2)
    image = Image.fromarray(pixels)
    white = Image.new("RGBA", image.size, "white")
    known = Image.alpha_composite(white, image).convert("RGB").tobytes()
    assert bytes_of(run_node(SCRIPT, [case_of("white", pixels)], tmp_path)) == [known]


def png(pixels: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


def test_prepared_pixels_are_those_that_python_reads_from_a_file(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    cases, known = [], []
    for number in range(PREPARED):
        pixels = random_pixels(random, sides(random, 260), 4)
        if number % 2:
            pixels[..., 3] = 255
        height, width = (8 * random.integers(1, 13, 2)).tolist()
        short_side = int(random.choice([min(height, width), 7, 33, 90]))
        facts = {"image_size": [height, width], "short_side": short_side}
        cases.append(case_of("prepare", pixels, facts=facts))
        found = read_pixels(png(pixels), (height, width), short_side)
        known.append(found.transpose(2, 0, 1).tobytes())
    assert bytes_of(run_node(SCRIPT, cases, tmp_path)) == known


def test_sides_between_two_sizes_are_rounded_half_to_even(tmp_path: Path) -> None:
    cases, known = [], []
    for width in (5, 7, 9, 11, 13):  # half of it is between two sizes
        pixels = random_pixels(np.random.default_rng(width), [width, 4], 4)
        facts = {"image_size": [2, 2], "short_side": 2}
        cases.append(case_of("prepare", pixels, facts=facts))
        known.append(read_pixels(png(pixels), (2, 2), 2).transpose(2, 0, 1).tobytes())
    assert bytes_of(run_node(SCRIPT, cases, tmp_path)) == known


def test_a_photograph_that_is_too_long_and_thin_is_refused(tmp_path: Path) -> None:
    pixels = np.zeros((1, 2000, 4), np.uint8)
    facts = {"image_size": [224, 224], "short_side": 256}
    (found,) = run_node(SCRIPT, [case_of("prepare", pixels, facts=facts)], tmp_path)
    assert found == ("Error: 512000 x 256 is more than 64000000 pixels; cut the photograph")
