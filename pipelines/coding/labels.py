"""Names the images below a folder by a classifier, and writes the names as a label file.

Such a file is what the source `image_folder` and `mantis score --labels` read. Shapes: B batch,
n classes, H W pixels.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.sources.folder import is_image
from data_prep.storage import Found as Listed
from data_prep.storage import files_below, in_threads, join, read_bytes
from mantis_core.device.files import Failure, shown
from mantis_core.networks.inference import full_float32
from mantis_core.networks.preprocessing import normalise
from mantis_core.pixels import ImageError, read_pixels

COLUMNS = ("file", "class", "probability")
BATCH_SIZE = 64


@dataclass(frozen=True)
class Classifier:
    """A network and the classes it knows, in the order of its logits.

    `network` maps normalised images (B, 3, H, W) on `device` to logits (B, n). Images are resized
    to `short_side` and cut to their centre of `image_size` (H, W), as in evaluation.
    """

    network: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    image_size: tuple[int, int]
    short_side: int
    device: torch.device


@dataclass(frozen=True)
class Named:
    """An image by its path below the folder, and the class that a classifier finds most likely."""

    file: str
    class_id: str
    probability: float


class Images(NamedTuple):
    """The images below a folder, in order, and how many files of other suffixes lie there."""

    files: list[Listed]
    others: Counter[str]


def find_images(folder: str) -> Images:
    """Returns the images below a folder or URI: those that the source `image_folder` takes.

    Raises DataError if a folder below it may not be read.
    """
    images = Images([], Counter())
    for each in files_below(folder):
        if is_image(each.path):
            images.files.append(each)
        else:
            suffix = os.path.splitext(each.path)[1].lower()
            images.others[shown(suffix) or "no suffix"] += 1
    return images


def name_each(
    classifier: Classifier, folder: str, images: Sequence[Listed], *, batch_size: int = BATCH_SIZE
) -> Iterator[Named | Failure]:
    """Yields the class of each image below `folder`, or why it has none.

    Images are read by several threads. The named ones come in order, a batch at a time.
    """

    def pixels(image: Listed) -> NDArray[np.uint8] | Failure:
        return _pixels(classifier, folder, image)

    waiting: list[tuple[str, NDArray[np.uint8]]] = []
    for image, found in zip(images, in_threads(pixels, images), strict=True):
        if isinstance(found, Failure):
            yield found
            continue
        waiting.append((image.path, found))
        if len(waiting) == batch_size:
            yield from _named(classifier, waiting)
            waiting = []
    if waiting:
        yield from _named(classifier, waiting)


class LabelFile:
    """Writes a line for each image to an open text file, below a header. Counts the classes."""

    def __init__(self, file: TextIO) -> None:
        self._csv = csv.writer(file, lineterminator="\n")
        self._csv.writerow(COLUMNS)
        self.classes: Counter[str] = Counter()

    def add(self, named: Named) -> None:
        """Adds the line of one image."""
        self._csv.writerow((named.file, named.class_id, f"{named.probability:.4f}"))
        self.classes[named.class_id] += 1


def _pixels(classifier: Classifier, folder: str, image: Listed) -> NDArray[np.uint8] | Failure:
    """Returns an image (H, W, 3), or why it cannot be read."""
    path = Path(folder, image.path)
    if not image.named:
        return Failure(path, f"{shown(path)} has a name that is not UTF-8; rename it")
    try:
        data = read_bytes(join(folder, image.path))
        return read_pixels(data, classifier.image_size, classifier.short_side)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # pyarrow's text has the path
        return Failure(path, f"cannot read {shown(path)}: {reason}")
    except ImageError as error:
        return Failure(path, f"{shown(path)} is no readable image: {error}")


def _named(
    classifier: Classifier, images: Sequence[tuple[str, NDArray[np.uint8]]]
) -> Iterator[Named]:
    """Yields the classes of one batch."""
    stacked = torch.from_numpy(np.stack([pixels for _, pixels in images])).permute(0, 3, 1, 2)
    with torch.no_grad(), full_float32(classifier.device.type):
        logits = classifier.network(normalise(stacked.to(classifier.device)))
        sure, said = torch.softmax(logits.float(), dim=1).max(dim=1)
    for (file, _), index, probability in zip(images, said.tolist(), sure.tolist(), strict=True):
        yield Named(file, classifier.classes[index], probability)
