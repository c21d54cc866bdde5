"""Divides the rows of an index into train, holdout and val, by hashes of their images.

Reads no images. Equal images have one hash, so they never stand on both sides of a division.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import SPLITS


def with_val(index: pa.Table, data: DataConfig) -> pa.Table:
    """Returns an index of train rows of which `val_fraction` are val, both cut to their caps.

    The experiment's seed has no part in the choice, so that experiments of several seeds are
    measured on the same images.
    """
    assert data.val_fraction is not None
    chosen = chosen_for_val(
        index["content"].to_pylist(), index["class_indices"].to_pylist(), data.val_fraction
    )
    names = pa.array(["val" if each else "train" for each in chosen], pa.string())
    index = index.drop_columns(["split"]).append_column("split", names)
    index = index.sort_by([("key", "ascending")])
    parts = []
    for split, cap in (("train", data.train_rows), ("val", data.val_rows)):
        part = index.filter(pc.equal(index["split"], split))
        parts.append(part if cap is None else part.slice(0, cap))
    return pa.concat_tables(parts)


def chosen_for_val(
    contents: Sequence[bytes], classes: Sequence[Sequence[int]], fraction: float
) -> list[bool]:
    """Chooses rows for val by hashes of their images, class by class.

    An image of several classes counts as one of the rarest of them, one of no class as of a class
    of its own kind. Of each class the share `fraction` is chosen, rounded: at least one image if it
    has two, and never all.
    """
    of_image: dict[bytes, set[int]] = defaultdict(set)
    for content, indices in zip(contents, classes, strict=True):
        of_image[content].update(indices)
    counts = Counter(index for own in of_image.values() for index in own)
    images: dict[int, list[bytes]] = defaultdict(list)
    for content, own in of_image.items():
        images[min(own, key=lambda index: (counts[index], index), default=-1)].append(content)
    chosen: set[bytes] = set()
    for members in images.values():
        members.sort(key=lambda content: hashlib.sha256(b"val\0" + content).digest())
        wanted = max(1, round(fraction * len(members)))
        chosen.update(members[: min(wanted, len(members) - 1)])
    return [content in chosen for content in contents]


def ordered_splits(
    index: pa.Table, data: DataConfig, seed: int, splits: Sequence[str]
) -> dict[str, pa.Table]:
    """Returns train, holdout and val in their final order, with `split` and unique `row_id`.

    Raises DataError where train or val is empty.
    """
    index = index.sort_by([("key", "ascending")])
    parts = {split: index.filter(pc.equal(index["split"], split)) for split in splits}
    if "train" in parts:
        held = pa.array(_held_out(parts["train"]["content"].to_pylist(), data, seed), pa.bool_())
        train = parts["train"]
        parts |= {"train": train.filter(pc.invert(held)), "holdout": train.filter(held)}
    ordered, first_id = {}, 0
    for split in (name for name in SPLITS if name in parts):
        part = parts[split]
        if not part.num_rows and split != "holdout":
            raise DataError(
                f"no readable {split} image of any task is left; check rejected.parquet, "
                "data.unassigned, data.holdout_fraction and data.val_fraction, which takes no "
                "image of a class that has one image"
            )
        ids = pa.array(range(first_id, first_id + part.num_rows), pa.int64())
        names = pa.array([split] * part.num_rows, pa.string())
        ordered[split] = part.drop_columns(["split"]).append_column("split", names)
        ordered[split] = ordered[split].append_column("row_id", ids)
        first_id += part.num_rows
    return ordered


def _held_out(contents: list[bytes], data: DataConfig, seed: int) -> list[bool]:
    """Chooses the rows kept out of training by content hash: equal images go together."""
    wanted = math.ceil(data.holdout_fraction * len(contents))
    keys = [hashlib.sha256(b"holdout\0%d\0" % seed + content).digest() for content in contents]
    if not wanted:
        return [False] * len(keys)
    limit = sorted(keys)[wanted - 1]
    return [key <= limit for key in keys]
