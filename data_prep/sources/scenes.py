"""The `scenes` source: procedural images of several signs, each the evidence of one question.

A scene has signs of different colours in random places. On each stands one of four figures, drawn
independently: which figure stands on the red sign says nothing of the blue one. So the worth of a
request is known beforehand: an answer to one of K such questions needs a K-th of the evidence.
Mirroring a scene changes no figure.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw
from pydantic import Field

from data_prep.sources.base import RawRow, SourceConfig, references

HUES = {
    "red": 0.0,
    "green": 0.33,
    "blue": 0.62,
    "yellow": 0.155,
    "violet": 0.79,
    "cyan": 0.5,
    "orange": 0.075,
    "grey": None,
}
FIGURES = ("triangle", "disc", "cross", "ring")
NOISE = 10.0  # standard deviation, grey levels


class Scenes(SourceConfig):
    """Procedural scenes: several signs in every image, and a question about each."""

    kind: Literal["scenes"] = "scenes"
    """Procedural scenes: several signs in every image, and a question about each."""
    things: int = Field(default=4, ge=2, le=len(HUES))
    """Signs in each image, and questions about it: the first of `red`, `green`, `blue`, `yellow`,
    `violet`, `cyan`, `orange` and `grey`. They name the tasks."""
    train_rows: int = Field(default=4000, ge=0)
    """Images of the train split. The default is enough for a short training on a laptop."""
    val_rows: int = Field(default=500, ge=0)
    """Images of the val split."""
    size: int = Field(default=64, ge=32)
    """Side of an image in pixels; the default is that of `data.image_size`."""
    seed: int = 0
    """Seed of the drawings. It is not the experiment's `seed`, so that experiments of several
    seeds see the same images."""

    @property
    def declares_classes(self) -> bool:
        return True

    def declared_classes(self, task: str) -> tuple[str, ...]:
        return tuple(f"{task}/{figure}" for figure in FIGURES) if task in self._signs else ()

    def listing(self, root: str, split: str) -> pa.Table:
        count = self.train_rows if split == "train" else self.val_rows
        return references(
            [f"{split}/{index:07d}" for index in range(count)],
            [
                [f"{s}/{f}" for s, f in zip(self._signs, self._figures(split, index), strict=True)]
                for index in range(count)
            ],
            [split] * count,
            list(range(count)),
            [0] * count,
        )

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        for split, index in zip(
            references["path"].to_pylist(), references["position"].to_pylist(), strict=True
        ):
            yield RawRow(self._draw(split, index), {})

    def state(self, root: str, split: str) -> Iterator[str]:
        yield self.model_dump_json()

    @property
    def _signs(self) -> tuple[str, ...]:
        return tuple(HUES)[: self.things]

    def _random(self, split: str, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(split == "val"), index, purpose])

    def _figures(self, split: str, index: int) -> list[str]:
        drawn = self._random(split, index, 0).integers(len(FIGURES), size=self.things)
        return [FIGURES[number] for number in drawn.tolist()]

    def _draw(self, split: str, index: int) -> bytes:
        random = self._random(split, index, 1)
        image = Image.new("RGB", (self.size, self.size), (int(random.uniform(30, 100)),) * 3)
        aside = math.ceil(math.sqrt(self.things))  # cells each way
        places = random.permutation(aside**2)[: self.things].tolist()
        cell = self.size / aside
        for sign, figure, place in zip(
            self._signs, self._figures(split, index), places, strict=True
        ):
            side = random.uniform(0.78, 0.96) * cell
            x, y = random.uniform(0, cell - side, 2)
            left, top = place % aside * cell + x, place // aside * cell + y
            _sign(random, image, HUES[sign], figure, (left, top, left + side, top + side))
        noise = random.normal(0.0, NOISE, (self.size, self.size, 3))
        pixels = np.clip(np.rint(np.asarray(image, np.float64) + noise), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()


def _sign(
    random: np.random.Generator,
    image: Image.Image,
    hue: float | None,
    figure: str,
    box: tuple[float, float, float, float],
) -> None:
    """Draws a sign of a colour, None for grey, with a dark figure in its middle."""
    light = random.uniform(0.55, 0.65)
    turned = 0.0 if hue is None else hue + random.uniform(-0.015, 0.015)
    colour = colorsys.hls_to_rgb(turned % 1, light, 0.0 if hue is None else 0.95)
    pen = ImageDraw.Draw(image)
    pen.rectangle(box, tuple(round(255 * part) for part in colour))
    side = box[2] - box[0]
    reach = random.uniform(0.28, 0.36) * side
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    dark = (int(random.uniform(0, 40)),) * 3
    if figure == "triangle":
        pen.polygon([(x, y - reach), (x + reach, y + reach), (x - reach, y + reach)], dark)
    elif figure == "cross":
        arm = reach / 3
        pen.rectangle((x - arm, y - reach, x + arm, y + reach), dark)
        pen.rectangle((x - reach, y - arm, x + reach, y + arm), dark)
    elif figure == "disc":
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), dark)
    else:
        width = max(1, round(reach / 2.6))
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=dark, width=width)
