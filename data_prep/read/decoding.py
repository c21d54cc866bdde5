"""Turns rows of a shard into arrays: decodes, crops, augments. Chooses no rows, reads no files.

B rows, K tasks, H W pixels. Augmentation is a function of (seed, epoch, row id) alone: a row looks
the same whichever worker, batch or restart decodes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from data_prep.checks import IGNORE, STORED_FORMATS
from data_prep.manifest import Manifest, task_names
from data_prep.reading import ReadingConfig
from mantis_core.pixels import cover

Batch = dict[str, NDArray[np.generic]]
Indices = NDArray[np.int64]

CROP_TRIES = 10


@dataclass(frozen=True)
class Decoder:
    """How rows become arrays.

    `augment` is (seed, epoch) in training; with None every image is cut to its centre and `reading`
    has no effect.
    """

    size: tuple[int, int]  # height, width
    num_tasks: int
    segmentations: tuple[str, ...]
    reading: ReadingConfig
    augment: tuple[int, int] | None

    @classmethod
    def of(
        cls, manifest: Manifest, reading: ReadingConfig, augment: tuple[int, int] | None
    ) -> Decoder:
        """Returns the decoder of a prepared folder."""
        names = task_names(manifest.tasks, "segmentation")
        return cls(manifest.image_size, len(manifest.tasks), names, reading, augment)

    @property
    def columns(self) -> list[str]:
        """Columns of a shard that decoding needs."""
        masks = [f"mask_{name}" for name in self.segmentations]
        return ["row_id", "image", "class_label", "labels", "task_mask", *masks]

    def decode(self, rows: pa.Table) -> Batch:
        """Decodes rows to one batch.

        `image` uint8 (B, 3, H, W), `class_label` int64 (B,), `labels` int64 (B, K), `task_mask`
        bool (B, K), `row_id` int64 (B,), `segmentation/<task>` uint8 (B, H, W), 255 = ignore.
        """
        count, (height, width) = rows.num_rows, self.size
        images = np.empty((count, 3, height, width), np.uint8)
        masks = {
            name: np.full((count, height, width), IGNORE, np.uint8) for name in self.segmentations
        }
        row_ids = rows["row_id"].to_pylist()
        encoded = {name: rows[f"mask_{name}"].to_pylist() for name in self.segmentations}
        for index, data in enumerate(rows["image"].to_pylist()):
            layers = {
                name: _open(column[index]) for name, column in encoded.items() if column[index]
            }
            image, cut = self.view(_open(data).convert("RGB"), layers, row_ids[index])
            images[index] = image.transpose(2, 0, 1)
            for name, layer in cut.items():
                masks[name][index] = layer
        return {
            "image": images,
            "class_label": rows["class_label"].to_numpy().astype(np.int64),
            "labels": _matrix(rows["labels"], self.num_tasks).astype(np.int64),
            "task_mask": _matrix(rows["task_mask"], self.num_tasks).astype(np.bool_),
            "row_id": np.array(row_ids, np.int64),
            **{f"segmentation/{name}": mask for name, mask in masks.items()},
        }

    def view(
        self, image: Image.Image, masks: dict[str, Image.Image], row_id: int
    ) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
        """Crops and mirrors an image and its masks alike; returns (H, W, 3), and (H, W) by mask."""
        height, width = self.size
        image = cover(image, self.size)
        masks = {
            name: cover(mask, self.size, Image.Resampling.NEAREST) for name, mask in masks.items()
        }
        random = None
        if self.augment is not None:
            random = np.random.default_rng([*self.augment, row_id])
        mirror = random is not None and self.reading.flip and random.random() < 0.5
        if random is not None and self.reading.augmentation == "random_resized_crop":
            box = crop_box(random, image.size, self.reading.min_crop_area)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
            masks = {
                name: mask.resize((width, height), Image.Resampling.NEAREST, box=box)
                for name, mask in masks.items()
            }
            random = None  # what is left is to mirror
        padding = self.reading.crop_padding if self.reading.augmentation == "padded_crop" else 0
        rows = _window(image.height, height, padding, random)
        columns = _window(image.width, width, padding, random)
        if mirror:
            columns = columns[::-1]
        return _taken(image, rows, columns), {
            name: _taken(mask, rows, columns) for name, mask in masks.items()
        }


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Joins batches to one, in order."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def crop_box(
    random: np.random.Generator, size: tuple[int, int], min_area: float
) -> tuple[float, float, float, float]:
    """Draws (left, top, right, bottom) in an image of (width, height), all in px.

    The box has at least the share `min_area` of the image and a side ratio of 3/4 to 4/3
    ("Inception" crop, arXiv 1409.4842; the ratios as in torchvision).
    """
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(min_area, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            left = random.uniform(0, width - crop_width)
            top = random.uniform(0, height - crop_height)
            return (left, top, left + crop_width, top + crop_height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def _window(
    available: int, wanted: int, padding: int, random: np.random.Generator | None
) -> Indices:
    """Returns `wanted` neighbouring indices: the middle ones, or random ones, mirrored at edges.

    A padding beyond the other edge is mirrored there again.
    """
    if random is None:
        start = (available - wanted) // 2
    else:
        start = int(random.integers(-padding, available - wanted + padding + 1))
    last = available - 1
    period = (start + np.arange(wanted)) % max(1, 2 * last)  # there and back again
    mirrored: Indices = last - np.abs(last - period)
    return mirrored


def _taken(image: Image.Image, rows: Indices, columns: Indices) -> NDArray[np.uint8]:
    pixels = np.asarray(image, np.uint8)
    return pixels.take(rows, axis=0).take(columns, axis=1)  # faster than pixels[np.ix_(..)]


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=STORED_FORMATS)
    image.load()
    return image


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.generic]:
    """Returns a column of fixed-size lists as (B, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[np.generic] = flat.reshape(-1, width)
    return matrix
