"""Looks at a folder of images: how they lie, how many there are, of which classes and sizes."""

from __future__ import annotations

import io
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pydantic import TypeAdapter

from data_prep.sources.base import SourceConfig, notes_of
from data_prep.sources.kinds import AnySource
from pipelines.starting.folders import (
    LABEL_SUFFIXES,
    files_below,
    folder_reading,
    nothing_found,
)
from pipelines.starting.packed import parquet_reading, tar_reading
from pipelines.starting.reading import Reading, StartError, some

SAMPLED = 32
"""Images whose size is looked at. The median of so many says which sizes fit."""
FEW_OF_A_CLASS = 20


@dataclass(frozen=True)
class Found:
    """What lies in a folder of images.

    `counts` has the train images of each class, `groups` the classes of each task. `short_side` is
    the median short side of some images in pixels.
    """

    reading: Reading
    counts: Mapping[str, int]
    train_images: int
    val_images: int
    short_side: int
    groups: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class ids of all images, sorted."""
        return tuple(sorted(self.counts))


def look(paths: Sequence[Path], labels: str | None = None) -> Found:
    """Looks at a folder, or at Parquet files or tars of one data set.

    `labels` names the label file of a folder, or the column of labels of Parquet files. Opens label
    files, label columns and SAMPLED images. Raises StartError or DataError.
    """
    try:
        reading = _reading(paths, labels)
        return _counted(reading)
    except OSError as error:
        raise StartError(
            f"{error.filename or paths[0]} cannot be read: {error.strerror or error}"
        ) from None


def _reading(paths: Sequence[Path], labels: str | None) -> Reading:
    """Returns the one way to read these paths. Raises StartError if there are several or none."""
    remote = [path for path in paths if re.match(r"\w{2,}:/", str(path))]
    if remote:
        raise StartError(
            f"{remote[0]} is no folder of this machine. Sources may be URIs, but a config for one "
            "is written by hand: docs/guide/data.md"
        )
    gone = [path for path in paths if not path.exists()]
    if gone:
        raise StartError(f"there is no {gone[0]}: give a folder of images, or Parquet files")
    if len(paths) > 1 or paths[0].is_file():
        return _of_files(paths, labels)
    folder = paths[0]
    packed: dict[str, list[Path]] = {".parquet": [], ".tar": []}
    for path in files_below(folder):
        if path.suffix.lower() in packed:
            packed[path.suffix.lower()].append(path)
    column = labels if packed[".parquet"] or packed[".tar"] else None
    label_file = Path(labels) if labels and not column else None
    if label_file is not None and not label_file.is_file():
        label_file = folder / label_file
        if not label_file.is_file():
            raise StartError(f"--labels: there is no file {labels}, in {folder} neither")
    images = folder_reading(folder, label_file)
    kinds = [
        *([f"{len(packed['.parquet'])} Parquet files"] if packed[".parquet"] else []),
        *([f"{len(packed['.tar'])} tar files"] if packed[".tar"] else []),
        *([images.what] if images else []),
    ]
    if len(kinds) > 1:
        raise StartError(
            f"{folder} can be read in {'two' if len(kinds) == 2 else 'three'} ways: "
            f"{' or '.join(kinds)}. Give the folder or the files that you mean: `mantis init "
            f"{min(path for each in packed.values() for path in each)}`"
        )
    if packed[".parquet"]:
        return parquet_reading(folder, packed[".parquet"], column)
    if packed[".tar"]:
        return tar_reading(folder, packed[".tar"], column)
    if images is None:
        raise nothing_found(folder)
    return images


def _of_files(paths: Sequence[Path], labels: str | None) -> Reading:
    """Returns the reading of files that were named: Parquet files, tars or one label file."""
    kinds = {path.suffix.lower() for path in paths}
    folder = paths[0].parent
    if len(kinds) > 1 or any(path.parent != folder for path in paths):
        raise StartError("give one folder, or files of one kind that lie in one folder")
    kind = kinds.pop()
    if kind == ".parquet":
        return parquet_reading(folder, sorted(paths), labels)
    if kind == ".tar":
        return tar_reading(folder, sorted(paths), labels)
    if kind in LABEL_SUFFIXES and len(paths) == 1:
        found = folder_reading(folder, paths[0])
        if found is None:
            raise nothing_found(folder)
        return found
    raise StartError(
        f"{paths[0]} is no folder, Parquet file, tar or label file "
        f"({', '.join(LABEL_SUFFIXES)}): give the folder that holds the images"
    )


def _counted(reading: Reading) -> Found:
    """Lists the source of a reading and looks at some of its images. Raises StartError."""
    source: SourceConfig = TypeAdapter(AnySource).validate_python(dict(reading.source))
    root = str(reading.root.absolute())
    train = source.listing(root, "train")
    val = source.listing(root, "val") if reading.has_val else None
    counts = Counter(class_id for ids in train["class_ids"].to_pylist() for class_id in ids)
    if len(counts) < 2:
        raise StartError(
            f"{reading.root} has images of {'one class alone' if counts else 'no class'}"
            f"{f', {next(iter(counts))}' if counts else ''}: a codec answers which of several it "
            "is, so add images of another class"
        )
    small = [name for name, count in sorted(counts.items()) if count < FEW_OF_A_CLASS]
    notes = list(reading.notes)
    if small:
        notes.append(
            f"fewer than {FEW_OF_A_CLASS} train images of {some(small)}: aim for 100 of each class"
        )
    notes += [*notes_of(train), *([] if val is None else notes_of(val))]
    groups = {name: ids for name, ids in reading.groups.items()}
    if sorted(each for ids in groups.values() for each in ids) != sorted(counts):
        groups = {}
    return Found(
        reading=reading,
        counts=dict(counts),
        train_images=train.num_rows,
        val_images=0 if val is None else val.num_rows,
        short_side=_short_side(source, root, train),
        groups=groups,
        notes=tuple(notes),
    )


def _short_side(source: SourceConfig, root: str, listing: pa.Table) -> int:
    """Returns the median short side of some images, px. Raises StartError if none can be read."""
    step = max(1, listing.num_rows // SAMPLED)
    sides, errors = [], []
    for row in source.read(root, listing.take(list(range(0, listing.num_rows, step))[:SAMPLED])):
        try:
            with Image.open(io.BytesIO(row.image)) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            errors.append(row.error or str(error))
    if not sides:
        raise StartError(
            f"none of {len(errors)} images looked at can be read: {errors[0] if errors else ''}"
        )
    return round(statistics.median(sides))
