"""Counts the images of each label in a prepared folder. Decodes no image."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.storage import filesystem, join


def absent_labels(folder: str, manifest: Manifest, split: str) -> dict[str, tuple[str, ...]]:
    """Returns the labels that no image of a split has, by task.

    A task that no image has is there with all its labels. A segmentation is asked for images with
    a mask only. Reads two columns of every shard. Raises DataError where one is damaged.
    """
    count = len(manifest.tasks)
    seen = [np.zeros(0, np.int64)] * count
    active = np.zeros(count, bool)
    for shard in manifest.split(split).shards:
        labels, mask = _columns(join(folder, shard.path), count)
        active |= mask.any(axis=0)
        seen = [np.union1d(known, labels[:, k]) for k, known in enumerate(seen)]
    absent = {}
    for k, task in enumerate(manifest.tasks):
        found = set(range(len(task.labels)) if task.kind == "segmentation" else seen[k].tolist())
        missing = [name for i, name in enumerate(task.labels) if not active[k] or i not in found]
        if missing:
            absent[task.name] = tuple(missing)
    return absent


def _columns(path: str, count: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Returns the labels (rows, tasks) and the task mask (rows, tasks) of a shard."""
    store, inner = filesystem(path)
    try:
        table = pq.read_table(inner, filesystem=store, columns=["labels", "task_mask"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"shard {path} is missing or damaged ({error}): delete its folder and prepare again"
        ) from None
    columns = []
    for name in ("labels", "task_mask"):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        columns.append(flat.reshape(-1, count))
    return columns[0], columns[1]
