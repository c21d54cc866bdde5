"""Rows of a shard to arrays of one shape: decode, crop, augment. Chooses no rows, reads no files.

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

from data_prep.checks import IGNORE, KEPT_FORMATS
from data_prep.schema import DataConfig, Manifest, task_names

Batch = dict[str, NDArray[np.generic]]
Indices = NDArray[np.int64]
CROP_TRIES = 10


@dataclass(frozen=True)
class Decoder:
    """How rows become arrays. `augment` is (seed, epoch), or None for the plain centre crop."""

    size: tuple[int, int]  # height, width
    num_tasks: int
    segmentations: tuple[str, ...]
    data: DataConfig
    augment: tuple[int, int] | None

    @classmethod
    def of(cls, manifest: Manifest, data: DataConfig, augment: tuple[int, int] | None) -> Decoder:
        names = task_names(manifest.tasks, "segmentation")
        return cls(manifest.image_size, len(manifest.tasks), names, data, augment)

    @property
    def columns(self) -> list[str]:
        """Columns of a shard it needs."""
        masks = [f"mask_{name}" for name in self.segmentations]
        return ["row_id", "image", "class_label", "labels", "task_mask", *masks]

    def decode(self, rows: pa.Table) -> Batch:
        """`image` uint8 (B, 3, H, W), `class_label` int64 (B,), `labels` int64 (B, K), `task_mask`
        bool (B, K), `row_id` int64 (B,), `segmentation/<task>` uint8 (B, H, W), 255 = ignore."""
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
            image, cut = self._view(_open(data).convert("RGB"), layers, row_ids[index])
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

    def _view(
        self, image: Image.Image, masks: dict[str, Image.Image], row_id: int
    ) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
        """(H, W, 3) and (H, W) per mask: the same crop and mirroring of an image and its masks."""
        height, width = self.size
        image, masks = _covering(image, masks, self.size)
        random = None
        if self.augment is not None:
            random = np.random.default_rng([*self.augment, row_id])
        mirror = random is not None and self.data.flip and random.random() < 0.5
        if random is not None and self.data.augmentation == "random_resized_crop":
            box = crop_box(random, image.size, self.data.min_crop_area)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
            masks = {
                name: mask.resize((width, height), Image.Resampling.NEAREST, box=box)
                for name, mask in masks.items()
            }
            random = None  # what is left is to mirror
        padding = self.data.crop_padding if self.data.augmentation == "padded_crop" else 0
        rows = _window(image.height, height, padding, random)
        columns = _window(image.width, width, padding, random)
        if mirror:
            columns = columns[::-1]
        return _taken(image, rows, columns), {
            name: _taken(mask, rows, columns) for name, mask in masks.items()
        }


def concatenated(batches: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def crop_box(
    random: np.random.Generator, size: tuple[int, int], min_area: float
) -> tuple[float, float, float, float]:
    """Random (left, top, right, bottom) of at least `min_area` of an image of (width, height), with
    a side ratio of 3/4 to 4/3 ("Inception" crop, arXiv 1409.4842; the ratios as in torchvision)."""
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


def _covering(
    image: Image.Image, masks: dict[str, Image.Image], size: tuple[int, int]
) -> tuple[Image.Image, dict[str, Image.Image]]:
    """Enlarged where it is smaller than (height, width), so that any crop fits inside."""
    scale = max(size[0] / image.height, size[1] / image.width)
    if scale <= 1:
        return image, masks
    larger = (max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale)))
    return image.resize(larger, Image.Resampling.BICUBIC), {
        name: mask.resize(larger, Image.Resampling.NEAREST) for name, mask in masks.items()
    }


def _window(
    available: int, wanted: int, padding: int, random: np.random.Generator | None
) -> Indices:
    """Indices of `wanted` neighbours: the middle ones, or random ones with the edges mirrored."""
    if random is None:
        start = (available - wanted) // 2
    else:
        start = int(random.integers(-padding, available - wanted + padding + 1))
    indices = np.abs(np.arange(start, start + wanted))
    last = available - 1
    mirrored: Indices = last - np.abs(last - indices)
    return mirrored


def _taken(image: Image.Image, rows: Indices, columns: Indices) -> NDArray[np.uint8]:
    pixels = np.asarray(image, np.uint8)
    return pixels.take(rows, axis=0).take(columns, axis=1)  # faster than pixels[np.ix_(..)]


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=KEPT_FORMATS)
    image.load()
    return image


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.generic]:
    """A column of fixed-size lists as (B, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[np.generic] = flat.reshape(-1, width)
    return matrix
