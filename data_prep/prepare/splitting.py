"""Divides the rows of an index into train, holdout and val, by hashes of their images.

Reads no images. Equal images have one hash, so they never stand on both sides of a division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import SPLITS
from data_prep.prepare.index import ROW, Part
from data_prep.prepare.staging import hashes
from data_prep.sources.base import CELLS, cells, joined, values_of


def with_val(index: pa.Table, data: DataConfig) -> pa.Table:
    """Returns an index of train rows of which `val_fraction` are val, both cut to their caps.

    The experiment's seed has no part in the choice, so that experiments of several seeds are
    measured on the same images.
    """
    assert data.val_fraction is not None
    chosen = chosen_for_val(index["content"], index["class_indices"], data.val_fraction)
    names = pa.DictionaryArray.from_arrays(pa.array(chosen.astype(np.int32)), ["train", "val"])
    index = index.drop_columns(["split"]).append_column("split", names)
    if data.train_rows is None and data.val_rows is None:
        return index
    order = pc.sort_indices(index, sort_keys=[("key", "ascending")])
    sorted_names = names.take(order)
    rows = [
        order.filter(pc.equal(sorted_names, split)).slice(0, cap)
        for split, cap in (("train", data.train_rows), ("val", data.val_rows))
    ]
    return index.take(pa.concat_arrays(rows))


def chosen_for_val(
    contents: pa.ChunkedArray, classes: pa.ChunkedArray, fraction: float
) -> NDArray[np.bool_]:
    """Chooses rows for val by hashes of their images, class by class.

    `contents` are the hashes of the images, `classes` lists of indices.

    An image of several classes counts as one of the rarest of them, one of no class as of a class
    of its own kind. Of each class the share `fraction` is chosen, rounded: at least one image if it
    has two, and never all.
    """
    coded = joined(contents).dictionary_encode()
    image_of, images = coded.indices.to_numpy(), coded.dictionary
    rarest = _rarest_class(image_of, classes, len(images))
    order = np.argsort(hashes(b"val\0" + content for content in cells(images)))
    order = order[np.argsort(rarest[order], kind="stable")]  # class by class, then by hash
    chosen = np.zeros(len(images), bool)
    for members in np.split(order, np.flatnonzero(np.diff(rarest[order])) + 1):
        wanted = max(1, round(fraction * len(members)))
        chosen[members[: max(0, min(wanted, len(members) - 1))]] = True
    found: NDArray[np.bool_] = chosen[image_of]
    return found


def _rarest_class(
    image_of: NDArray[np.int32], classes: pa.ChunkedArray, num_images: int
) -> NDArray[np.int64]:
    """Returns of each image the class that the fewest images have, -1 for one of no class.

    `image_of` is the image of each row. Of classes with as many images the first one counts.
    """
    values, rows = values_of(classes)
    counts = np.zeros(1 + (pc.max(values).as_py() or 0), np.int64)
    pairs = np.unique(image_of[rows.to_numpy()].astype(np.int64) * len(counts) + values.to_numpy())
    images, indices = np.divmod(pairs, len(counts))
    counts += np.bincount(indices, minlength=len(counts))
    order = np.lexsort([indices, counts[indices], images])
    first = order[np.flatnonzero(np.diff(images[order], prepend=-1))]
    rarest = np.full(num_images, -1)
    rarest[images[first]] = indices[first]
    return rarest


def ordered_splits(
    index: pa.Table, data: DataConfig, seed: int, splits: Sequence[str]
) -> dict[str, Part]:
    """Returns train, holdout and val in their final order, with ids that go on through them.

    Raises DataError where train or val is empty.
    """
    order = pc.sort_indices(index, sort_keys=[("key", "ascending")]).cast(ROW)
    names = index["split"].take(order)
    rows = {split: order.filter(pc.equal(names, split)) for split in splits}
    if "train" in rows:
        train = rows["train"]
        held = pa.array(_held_out(index["content"], train, data, seed))
        rows |= {"train": train.filter(pc.invert(held)), "holdout": train.filter(held)}
    index = index.drop_columns(["key", "split"])
    ordered, first_id = {}, 0
    for split in (name for name in SPLITS if name in rows):
        part = ordered[split] = Part(index, rows[split], first_id)
        if not part.num_rows and split != "holdout":
            raise DataError(
                f"no readable {split} image of any task is left; check rejected.parquet, "
                "data.unassigned, data.holdout_fraction and data.val_fraction, which takes no "
                "image of a class that has one image"
            )
        first_id += part.num_rows
    return ordered


def _held_out(
    contents: pa.ChunkedArray, rows: pa.Array, data: DataConfig, seed: int
) -> NDArray[np.bool_]:
    """Chooses which of the rows are kept out of training (len(rows),), by their images' hashes.

    Equal images go together.
    """
    wanted = math.ceil(data.holdout_fraction * len(rows))
    if not wanted:
        return np.zeros(len(rows), bool)
    some = (rows.slice(start, CELLS) for start in range(0, len(rows), CELLS))
    own = (content for few in some for content in contents.take(few).to_pylist())
    keys = hashes(b"holdout\0%d\0" % seed + content for content in own)
    last = keys[np.argpartition(keys, wanted - 1)[wanted - 1]]
    found: NDArray[np.bool_] = keys <= last
    return found
