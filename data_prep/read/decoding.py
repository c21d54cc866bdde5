"""Turns rows of a shard into arrays: decodes, crops, augments. Chooses no rows, reads no files.

B rows, K tasks, H W pixels. Augmentation is a function of (seed, epoch, row id) alone: a row looks
the same whichever worker, batch or restart decodes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from data_prep.checks import IGNORE, STORED_FORMATS
from data_prep.manifest import Manifest, task_names
from data_prep.reading import ReadingConfig
from mantis_core.pixels import cover

Batch = dict[str, NDArray[np.generic]]
Pixels = NDArray[np.uint8]

CROP_TRIES = 10


class Box(NamedTuple):
    """A part of an image in px. It may reach over the edges, where the image is mirrored."""

    top: int
    left: int
    height: int
    width: int


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
        return self.cut(self.opened_rows(rows), labels_of(rows, self.num_tasks))

    def opened_rows(self, rows: pa.Table) -> Iterator[tuple[Pixels, dict[str, Pixels]]]:
        """Yields what `opened` returns for each row."""
        encoded = {name: rows[f"mask_{name}"].to_pylist() for name in self.segmentations}
        for index, data in enumerate(rows["image"].to_pylist()):
            masks = {name: own[index] for name, own in encoded.items() if own[index]}
            yield self.opened(data, masks)

    def opened(self, data: bytes, masks: Mapping[str, bytes]) -> tuple[Pixels, dict[str, Pixels]]:
        """Decodes the files of a row to (h, w, 3), and (h, w) by mask, of at least `size`."""
        image = _open(data)
        colours = image if image.mode == "RGB" else image.convert("RGB")
        nearest = Image.Resampling.NEAREST
        return np.asarray(cover(colours, self.size)), {
            name: np.asarray(cover(_open(mask), self.size, nearest), np.uint8)
            for name, mask in masks.items()
        }

    def cut(self, layers: Iterable[tuple[Pixels, Mapping[str, Pixels]]], labels: Batch) -> Batch:
        """Joins the views of opened rows to one batch with their `labels`; see `decode`."""
        row_ids = labels["row_id"].tolist()
        images = np.empty((len(row_ids), 3, *self.size), np.uint8)
        masks = {
            name: np.full((len(row_ids), *self.size), IGNORE, np.uint8)
            for name in self.segmentations
        }
        for index, (row_id, (pixels, own)) in enumerate(zip(row_ids, layers, strict=True)):
            for name, layer in self.view(pixels, own, row_id, images[index]).items():
                masks[name][index] = layer
        return {
            "image": images,
            **labels,
            **{f"segmentation/{name}": mask for name, mask in masks.items()},
        }

    def view(
        self, pixels: Pixels, masks: Mapping[str, Pixels], row_id: int, image: Pixels
    ) -> dict[str, Pixels]:
        """Crops and mirrors an opened row alike in all layers, which are at least of `size`.

        Writes the image to `image` (3, H, W) and returns (H, W) by mask.
        """
        random = None
        if self.augment is not None:
            random = np.random.default_rng([*self.augment, row_id])
        mirror = random is not None and self.reading.flip and random.random() < 0.5
        box = self._box((pixels.shape[0], pixels.shape[1]), random)
        turn = slice(None, None, -1 if mirror else 1)
        part = _part(pixels, box)
        if part.shape[:2] == self.size:
            image[:] = part[:, turn].transpose(2, 0, 1)
        else:
            _scale(part, image, mirror=mirror)
        return {
            name: _nearest(_part(mask, box), self.size)[:, turn] for name, mask in masks.items()
        }

    def _box(self, available: tuple[int, int], random: np.random.Generator | None) -> Box:
        """Returns the part of an image of (height, width) to show, the middle without `random`."""
        height, width = self.size
        if random is None:
            return Box((available[0] - height) // 2, (available[1] - width) // 2, height, width)
        if self.reading.augmentation == "random_resized_crop":
            return crop_box(random, available, self.reading.min_crop_area)
        padding = self.reading.crop_padding if self.reading.augmentation == "padded_crop" else 0
        top, left = (
            int(random.integers(-padding, side - wanted + padding + 1))
            for side, wanted in zip(available, self.size, strict=True)
        )
        return Box(top, left, height, width)


def labels_of(rows: pa.Table, num_tasks: int) -> Batch:
    """Returns what a batch has of rows beside their pixels; see `Decoder.decode`."""
    return {
        "class_label": rows["class_label"].to_numpy().astype(np.int64),
        "labels": _matrix(rows["labels"], num_tasks).astype(np.int64),
        "task_mask": _matrix(rows["task_mask"], num_tasks).astype(np.bool_),
        "row_id": rows["row_id"].to_numpy().astype(np.int64),
    }


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Joins batches to one, in order."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def crop_box(random: np.random.Generator, size: tuple[int, int], min_area: float) -> Box:
    """Draws a part of an image of (height, width).

    It has at least the share `min_area` of the image, up to whole pixels, and a side ratio of 3/4
    to 4/3 ("Inception" crop, arXiv 1409.4842; ratios and whole pixels as in torchvision).
    """
    height, width = size
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(min_area, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(0, width - crop_width + 1))
            top = int(random.integers(0, height - crop_height + 1))
            return Box(top, left, crop_height, crop_width)
    side = min(width, height)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _part(layer: Pixels, box: Box) -> Pixels:
    """Returns a part of (h, w, ...), a view where it lies inside."""
    bottom, right = box.top + box.height, box.left + box.width
    if box.top >= 0 and box.left >= 0 and bottom <= layer.shape[0] and right <= layer.shape[1]:
        return layer[box.top : bottom, box.left : right]
    rows = _mirrored(box.top, box.height, layer.shape[0])
    columns = _mirrored(box.left, box.width, layer.shape[1])
    return layer.take(rows, axis=0).take(columns, axis=1)  # faster than layer[np.ix_(..)]


def _mirrored(start: int, wanted: int, available: int) -> NDArray[np.int64]:
    """Returns `wanted` neighbouring indices from `start`, mirrored at edges, however far beyond."""
    last = available - 1
    period = (start + np.arange(wanted)) % max(1, 2 * last)  # there and back again
    mirrored: NDArray[np.int64] = last - np.abs(last - period)
    return mirrored


def _scale(pixels: Pixels, image: Pixels, *, mirror: bool) -> None:
    """Resizes (h, w, 3) to `image` (3, H, W) by the bicubic filter, which smooths where it shrinks.

    PyTorch's kernel for bytes takes a fifth of Pillow's time. It is imported here alone, because
    processes that resize nothing need no PyTorch.
    """
    import torch
    from torch.nn.functional import interpolate

    # NumPy's copies, since PyTorch's of this size start threads in every thread that reads.
    layers = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    scaled = interpolate(layers, image.shape[1:], mode="bicubic", antialias=True)[0].numpy()
    image[:] = scaled[:, :, ::-1] if mirror else scaled


def _nearest(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes (h, w) to `size` by the nearest pixel's value."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(wanted) + 0.5) * side / wanted).astype(np.int64)
        for wanted, side in zip(size, mask.shape, strict=True)
    )
    return mask.take(rows, axis=0).take(columns, axis=1)


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=STORED_FORMATS)
    image.load()
    return image


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.generic]:
    """Returns a column of fixed-size lists as (B, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[np.generic] = flat.reshape(-1, width)
    return matrix
