"""The `shapes` source: procedural images with known answers, drawn from (seed, split, index) alone.

With it the whole pipeline runs without a download. It has three classifications, `outline` (which
closed line), `texture` (which filled pattern) and `stroke` (which open sign), and one segmentation,
`regions` (which pixels belong to a red, green or blue blob). An image shows one of them, or two
side by side. Mirroring an image changes no class.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field

from data_prep.sources.base import RawRow, SourceConfig, references

Box = tuple[float, float, float, float]  # left, top, right, bottom, px

CLASSES = {
    "outline": ("triangle", "square", "circle", "star"),
    "texture": ("rows", "columns", "checks", "dots"),
    "stroke": ("arrow_up", "arrow_down", "cross", "plus"),
}
REGIONS = "regions"  # mask values: 0 background, 1 red, 2 green, 3 blue
TASKS = (*CLASSES, REGIONS)
NOISE = 10.0  # standard deviation, grey levels


class Shapes(SourceConfig):
    """Procedural images with known answers, for a run without a download."""

    kind: Literal["shapes"] = "shapes"
    """Procedural images with known answers, for a run without a download."""
    train_rows: int = Field(default=2000, ge=0)
    """Images of the train split. The default is enough for a short training on a laptop."""
    val_rows: int = Field(default=400, ge=0)
    """Images of the val split."""
    size: int = Field(default=64, ge=16)
    """Side of an image in pixels; the default is that of `data.image_size`."""
    multi_task_fraction: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of images that show two tasks instead of one. By default most images show one, so
    that a codec gains by knowing which."""
    seed: int = 0
    """Seed of the drawings. It is not the experiment's `seed`, so that experiments of several
    seeds see the same images."""

    @property
    def mask_names(self) -> tuple[str, ...]:
        return (REGIONS,)

    @property
    def declares_classes(self) -> bool:
        return True

    def declared_classes(self, task: str) -> tuple[str, ...]:
        return tuple(f"{task}/{label}" for label in CLASSES.get(task, ()))

    def listing(self, root: str, split: str) -> pa.Table:
        count = self.train_rows if split == "train" else self.val_rows
        indices = list(range(count))
        return references(
            [f"{split}/{index:07d}" for index in indices],
            [
                [f"{task}/{label}" for task, label in self._content(split, index) if label]
                for index in indices
            ],
            [split] * count,
            indices,
            [0] * count,
        )

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        for split, index in zip(
            references["path"].to_pylist(), references["position"].to_pylist(), strict=True
        ):
            yield self._draw(split, index)

    def state(self, root: str, split: str) -> Iterator[str]:
        yield self.model_dump_json()

    def _random(self, split: str, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(split == "val"), index, purpose])

    def _content(self, split: str, index: int) -> list[tuple[str, str]]:
        """Returns (task, label) of each thing in the image; the label of `regions` is empty."""
        random = self._random(split, index, 0)
        count = 2 if random.random() < self.multi_task_fraction else 1
        chosen = random.permutation(len(TASKS))[:count]
        content = []
        for task in (TASKS[number] for number in chosen):
            labels = CLASSES.get(task, ("",))
            content.append((task, labels[int(random.integers(len(labels)))]))
        return content

    def _draw(self, split: str, index: int) -> RawRow:
        random = self._random(split, index, 1)
        content = self._content(split, index)
        image = Image.fromarray(_background(random, self.size))
        mask: Image.Image | None = None
        for (task, label), box in zip(
            content, _boxes(random, self.size, len(content)), strict=True
        ):
            if task == "outline":
                _outline(random, image, label, box)
            elif task == "texture":
                _texture(random, image, label, box)
            elif task == "stroke":
                _stroke(random, image, label, box)
            else:
                mask = Image.new("L", image.size, 0)
                _regions(random, image, mask, box)
        pixels = np.asarray(image, np.float64) + random.normal(
            0.0, NOISE, (self.size, self.size, 3)
        )
        noisy = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        return RawRow(_png(noisy), {} if mask is None else {REGIONS: _png(mask)})


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _background(random: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Draws a dim grey gradient, (size, size, 3)."""
    low, high = random.uniform(30, 100, 2)
    slope = np.linspace(low, high, size)[:, None, None] * np.ones((1, size, 3))
    return np.rot90(slope, int(random.integers(4))).astype(np.uint8)


def _boxes(random: np.random.Generator, size: int, count: int) -> list[Box]:
    """Places one box anywhere in the image, or two in a half of it each."""
    if count == 1:
        cells: list[Box] = [(0, 0, size, size)]
    elif random.random() < 0.5:
        cells = [(0, 0, size / 2, size), (size / 2, 0, size, size)]
    else:
        cells = [(0, 0, size, size / 2), (0, size / 2, size, size)]
    boxes = []
    for left, top, right, bottom in cells:
        side = random.uniform(0.72, 0.92) * min(right - left, bottom - top)
        x, y = random.uniform(left, right - side), random.uniform(top, bottom - side)
        boxes.append((x, y, x + side, y + side))
    return boxes


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.permutation(
        [random.uniform(190, 255), random.uniform(120, 255), random.uniform(60, 255)]
    )
    return int(red), int(green), int(blue)


def _outline(random: np.random.Generator, image: Image.Image, label: str, box: Box) -> None:
    corners = {"triangle": 3, "square": 4, "circle": 40, "star": 10}[label]
    x, y, radius = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
    turn = random.uniform(-0.25, 0.25) + (math.pi / 4 if label == "square" else -math.pi / 2)
    points = []
    for corner in range(corners + 1):
        reach = radius * (0.45 if label == "star" and corner % 2 else 1.0)
        angle = turn + 2 * math.pi * corner / corners
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    ImageDraw.Draw(image).line(points, _colour(random), max(2, round(radius / 9)), joint="curve")


def _texture(random: np.random.Generator, image: Image.Image, label: str, box: Box) -> None:
    left, top, right, bottom = (round(edge) for edge in box)
    width, height = right - left, bottom - top
    period = max(6, round(width / random.uniform(3.5, 6.0)))
    y, x = np.mgrid[:height, :width] + random.integers(period, size=2)[:, None, None]
    on_y, on_x = y % period < period / 2, x % period < period / 2
    on = {"rows": on_y, "columns": on_x, "checks": on_y ^ on_x, "dots": on_y & on_x}[label]
    light, dark = np.array(_colour(random)), np.array(_colour(random)) * 0.25
    patch = np.where(on[:, :, None], light, dark).astype(np.uint8)
    image.paste(Image.fromarray(patch), (left, top))


def _stroke(random: np.random.Generator, image: Image.Image, label: str, box: Box) -> None:
    left, top, right, bottom = box
    x, y, colour = (left + right) / 2, (top + bottom) / 2, _colour(random)
    width = max(3, round((right - left) / 8))
    lines = {
        "plus": [[(x, top), (x, bottom)], [(left, y), (right, y)]],
        "cross": [[(left, top), (right, bottom)], [(left, bottom), (right, top)]],
        "arrow_up": [[(x, bottom), (x, top)], [(left, y), (x, top), (right, y)]],
        "arrow_down": [[(x, top), (x, bottom)], [(left, y), (x, bottom), (right, y)]],
    }[label]
    for line in lines:
        ImageDraw.Draw(image).line(line, colour, width)


def _regions(random: np.random.Generator, image: Image.Image, mask: Image.Image, box: Box) -> None:
    left, top, right, bottom = box
    for value in 1 + random.permutation(3):
        colour = random.uniform(20, 110, 3)
        colour[value - 1] = random.uniform(170, 255)
        width, height = random.uniform(0.3, 0.6, 2) * (right - left)
        x, y = random.uniform(left, right - width), random.uniform(top, bottom - height)
        blob = (x, y, x + width, y + height)
        ImageDraw.Draw(image).ellipse(blob, fill=tuple(int(level) for level in colour))
        ImageDraw.Draw(mask).ellipse(blob, fill=int(value))
