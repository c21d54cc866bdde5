"""The rows of one arm and batch: a column for each figure of an image, -1 where an arm has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mantis_core.measure.metrics import pixel_confusion
from mantis_core.tasks import TaskSpec
from pipelines.evaluation.arms import Arrays

SIZES = ("wire_bytes", "payload_bytes", "session_bytes", "estimated_bits")
"""Columns of what an image takes, (N,)."""
REQUESTED = ("request_wire_bytes", "request_session_bytes")
"""Columns of what each request takes, (N, K), of a model that is asked."""


def blank(count: int, tasks: Sequence[TaskSpec]) -> Arrays:
    """Returns empty rows: -1 stands for an answer that an arm does not give."""
    rows: Arrays = {
        **{name: np.full(count, -1.0) for name in SIZES},
        "decoded": np.zeros((count, len(tasks)), dtype=bool),
        "sent": np.zeros((count, len(tasks)), dtype=bool),
        "answered": np.zeros(count),
        "predicted": np.full((count, len(tasks)), -1),
        "probabilities": np.full((count, len(tasks)), -1.0, dtype=np.float32),
        "class_index": np.full(count, -1),
        "client_class": np.full(count, -1),
        "answer": np.full(count, "", dtype=object),
        **{name: np.full((count, len(tasks)), -1.0) for name in REQUESTED},
    }
    for task in tasks:
        if not task.is_classification:
            cells = task.num_classes * (task.num_classes + 1)
            rows[f"confusion/{task.name}"] = np.zeros((count, cells), dtype=np.int64)
    return rows


def with_request_sizes(rows: Arrays, sizes: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """Fills in what each request takes, and as the size of an image the mean over its requests.

    `sizes` has (N, K) numbers for names of `SIZES`, -1 for a request that is not made.
    """
    for name, own in sizes.items():
        made = own >= 0
        total, count = np.where(made, own, 0).sum(axis=1), made.sum(axis=1)
        rows[name] = total / np.maximum(count, 1)
        if f"request_{name}" in REQUESTED:
            rows[f"request_{name}"] = own.astype(np.float64)
    return rows


def count_pixels(
    rows: Arrays,
    index: int,
    batch: Arrays,
    tasks: Sequence[TaskSpec],
    answers: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    for task in tasks:
        key = f"segmentation/{task.name}"
        if not task.is_classification and key in batch:
            counts = pixel_confusion(batch[key][index], answers.get(task.name), task.num_classes)
            rows[f"confusion/{task.name}"][index] = counts.reshape(-1)


def with_pixels_summed(rows: Arrays) -> Arrays:
    """Returns the rows of one arm and batch with each `confusion/<task>` summed over the images.

    The first row gets the sum as the bytes of int64, the others get b"". With 150 labels the counts
    of one image take 181 kB, too much to keep for each image and arm.
    """
    summed = dict(rows)
    for name in rows:
        if name.startswith("confusion/"):
            summed[name] = np.full(len(rows[name]), b"", dtype=object)
            summed[name][0] = rows[name].sum(axis=0).tobytes()
    return summed


def with_labels_of_class(rows: Arrays, tasks: Sequence[TaskSpec]) -> Arrays:
    """Fills in the label of each task that has the class of an image."""
    for k, task in enumerate(tasks):
        for label, class_index in enumerate(task.classes):
            rows["predicted"][rows["class_index"] == class_index, k] = label
    return rows
