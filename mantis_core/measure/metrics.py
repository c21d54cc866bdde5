"""From the answers to all images to the figures of an arm. No model, no files.

Shapes: N images, K tasks, n labels of a segmentation task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_average_precision

from mantis_core.tasks import IGNORE, TaskSpec

Array = NDArray[Any]
NO_LABEL = (
    *("agreement", "answered", "active_tasks", "client_macs", "client_bytes"),
    *("wire_bytes", "payload_bytes", "session_bytes", "estimated_bytes", "bpp", "payload_bpp"),
)
"""The last part of the names of figures that read no label."""


@dataclass(frozen=True)
class ImageRecords:
    """One arm's results, an entry an image.

    Truth: class_label (N,), labels (N, K), task_mask (N, K). Answers: class_index (N,), -1 where
    none was asked for; predicted (N, K) label of each decoded classification task; decoded (N, K)
    bool; answered (N,), 1 by the client itself, or the share of the requests that it answers.
    `sent` (N, K) are the tasks in the stream, of which a server leaves out those whose parent says
    so; None for those in `decoded`. `probabilities` (N, K) and sizes (N,) are None for arms that
    detect or send nothing.
    client_class (N,) is the class that the client gives each
    image, whether it sends it or not, None for one that gives none. `client_macs` and
    `client_bytes` are the multiply-adds of its networks for an image, and the size of its folder.
    request_wire_bytes and request_session_bytes (N, K) are what the request for each task takes,
    None for arms that are not asked for one task after the other.
    teacher_class (N,) and teacher_predicted (N, K) are the answers of the uncompressed teacher to
    the same images, -1 for none; None where it was not measured, and for the teacher itself.
    `confusion` holds (n, n + 1) pixel counts by segmentation task, rows the truth, the last column
    pixels of images whose mask was not decoded.
    """

    class_label: Array
    labels: Array
    task_mask: Array
    class_index: Array
    predicted: Array
    decoded: Array
    sent: Array | None = None
    probabilities: Array | None = None
    wire_bytes: Array | None = None
    payload_bytes: Array | None = None
    session_bytes: Array | None = None
    estimated_bits: Array | None = None
    answered: Array | None = None
    client_class: Array | None = None
    request_wire_bytes: Array | None = None
    request_session_bytes: Array | None = None
    client_macs: int | None = None
    client_bytes: int | None = None
    teacher_class: Array | None = None
    teacher_predicted: Array | None = None
    confusion: dict[str, Array] = field(default_factory=dict)


def figures(
    records: ImageRecords, tasks: Sequence[TaskSpec], *, single_class: bool, pixels: int
) -> dict[str, float]:
    """All figures that this arm has, by metric name, all finite; `pixels` is H x W of an input.

    `val/top1` is end to end: with one class an image the share of images whose class is named, else
    the share of (image, true classification task) pairs decoded and right. Where every task is a
    segmentation, `val/miou` stands in its place: the mean over tasks of their mean IoU.
    `val/detection/top1_if_right` and `_if_wrong` are top1 of the images whose most probable task
    is, or is not, a true one; `val/parents/top1` and `val/children/top1` are `val/task_top1` over
    the tasks that have children and over those that have a parent; `val/answered` is the share of
    images, or of requests, that the client has answered itself, `val/answered_top1` how many of
    those images it has right;
    `val/client_top1` is the top1 that the client has alone. `val/agreement`: see
    `agreement_figures`.
    """
    out: dict[str, float] = {}
    known = records.class_label >= 0
    right = (records.predicted == records.labels) & records.decoded & (records.labels >= 0)
    named = np.array([task.is_classification for task in tasks])
    asked = records.task_mask & named
    task_top1 = _share((right & asked).sum(), asked.sum())
    decides = single_class and (records.class_index >= 0).any()
    hits = (records.class_index == records.class_label) & known
    top1 = _share(hits.sum(), known.sum()) if decides else task_top1
    if top1 is not None:
        out["val/top1"] = top1
    if task_top1 is not None:
        out["val/task_top1"] = task_top1
    parents = {task.parent for task in tasks}
    levels = {
        "parents": np.array([task.name in parents for task in tasks]),
        "children": np.array([bool(task.parent) for task in tasks]),
    }
    for name, which in levels.items():
        value = _share((right & asked & which).sum(), (asked & which).sum())
        if value is not None:
            out[f"val/{name}/top1"] = value
    mious: list[float] = []
    for k, task in enumerate(tasks):
        active = records.task_mask[:, k]
        answered = active & records.decoded[:, k]
        share = _share(answered.sum(), active.sum())
        if share is not None:
            out[f"val/task/{task.name}/decoded"] = share
            if records.wire_bytes is not None:
                out[f"val/task/{task.name}/wire_bytes"] = float(records.wire_bytes[active].mean())
            for name in ("wire_bytes", "session_bytes"):
                sizes = getattr(records, f"request_{name}")
                if sizes is not None:
                    out[f"val/task/{task.name}/{name}"] = float(sizes[active, k].mean())
        if task.is_classification:
            value = _share((right[:, k] & answered).sum(), answered.sum())
            if value is not None:
                out[f"val/task/{task.name}/top1"] = value
        elif task.name in records.confusion:
            value = mean_iou(records.confusion[task.name])
            if value is not None:
                out[f"val/task/{task.name}/miou"] = value
                mious.append(value)
    if mious and not named.any():
        out["val/miou"] = float(np.mean(mious))
    if records.probabilities is not None:
        mask = records.decoded if records.sent is None else records.sent
        out |= detection_figures(records.probabilities, mask, records.task_mask)
        first = records.probabilities.argmax(axis=1)[:, None]
        right_first = np.take_along_axis(records.task_mask, first, axis=1)[:, 0]
        for name, which in (("right", right_first), ("wrong", ~right_first)):
            value = _share((hits & which).sum(), (known & which).sum()) if decides else None
            if value is not None:
                out[f"val/detection/top1_if_{name}"] = value
    if records.answered is not None and records.answered.any():
        out["val/answered"] = float(records.answered.mean())
        sure = records.answered.astype(bool)
        value = _share((hits & sure).sum(), (known & sure).sum()) if decides else None
        if value is not None:
            out["val/answered_top1"] = value
    if records.client_class is not None:
        own = _share(((records.client_class == records.class_label) & known).sum(), known.sum())
        if own is not None:
            out["val/client_top1"] = own
    for name in ("client_macs", "client_bytes"):
        if (cost := getattr(records, name)) is not None:
            out[f"val/{name}"] = float(cost)
    out |= agreement_figures(records, tasks, single_class=single_class)
    out |= _sizes(records, pixels)
    return out


def agreement_figures(
    records: ImageRecords, tasks: Sequence[TaskSpec], *, single_class: bool
) -> dict[str, float]:
    """How often an arm says what the uncompressed teacher says, {} where that is not known.

    `val/agreement` is, with one class an image, the share of images for which both name the same
    class; else the share of (image, classification task) pairs that were asked for, in which the
    task was decoded and both give the same label. `val/task/<name>/agreement` is that share of the
    pairs of one task. No answer is compared with a label: images of unknown class count as well.
    """
    out: dict[str, float] = {}
    overall = None
    if records.teacher_predicted is not None:
        named = np.array([task.is_classification for task in tasks])
        pairs = records.task_mask & named & (records.teacher_predicted >= 0)
        same = pairs & records.decoded & (records.predicted == records.teacher_predicted)
        overall = _share(same.sum(), pairs.sum())
        for k, task in enumerate(tasks):
            value = _share(same[:, k].sum(), pairs[:, k].sum())
            if value is not None:
                out[f"val/task/{task.name}/agreement"] = value
    if single_class and records.teacher_class is not None and (records.class_index >= 0).any():
        answered = records.teacher_class >= 0
        agrees = answered & (records.class_index == records.teacher_class)
        overall = _share(agrees.sum(), answered.sum())
    if overall is not None:
        out["val/agreement"] = overall
    return out


def figures_without_labels(found: dict[str, float]) -> dict[str, float]:
    """The figures of an arm that read no label: agreement, sizes, what the client costs."""
    return {name: value for name, value in found.items() if name.rpartition("/")[2] in NO_LABEL}


def chance(records: ImageRecords, tasks: Sequence[TaskSpec], *, single_class: bool) -> float | None:
    """The top1 of always giving the most frequent answer, in the sense of `figures`.

    None where nothing is classified.
    """
    if single_class:
        return _most_frequent([records.class_label[records.class_label >= 0]])
    asked = records.task_mask & (records.labels >= 0)
    return _most_frequent(
        [records.labels[asked[:, k], k] for k, task in enumerate(tasks) if task.is_classification]
    )


def detection_figures(probabilities: Array, mask: Array, truth: Array) -> dict[str, float]:
    """How well the mask (N, K) names the true tasks, and how the probabilities rank them.

    A figure over true tasks is left out where no image has a task.
    """
    first = probabilities.argmax(axis=1)[:, None]
    out = {
        "val/detection/exact_match": float((mask == truth).all(axis=1).mean()),
        "val/detection/active_tasks": float(mask.sum(axis=1).mean()),
        "val/detection/first": float(np.take_along_axis(truth, first, axis=1).mean()),
    }
    over_truth = {
        "micro_f1": _share(2 * (mask & truth).sum(), mask.sum() + truth.sum()),
        "coverage": _share((mask & truth).sum(), truth.sum()),
        "mean_average_precision": _mean_average_precision(probabilities, truth),
    }
    known = {name: value for name, value in over_truth.items() if value is not None}
    return out | {f"val/detection/{name}": value for name, value in known.items()}


def detection_curve(probabilities: Array, truth: Array) -> list[tuple[float, float]]:
    """What a threshold buys: (mean active tasks, share of true tasks kept), both (N, K).

    Of a row of thresholds from 1/2 down to 2**-12; an image's most probable task is always kept.
    """
    first = np.zeros_like(truth, dtype=bool)
    np.put_along_axis(first, probabilities.argmax(axis=1)[:, None], True, axis=1)
    curve = []
    for threshold in 2.0 ** -np.arange(1, 12.25, 0.25):
        mask = first | (probabilities > threshold)
        share = _share((mask & truth).sum(), truth.sum())
        curve.append((float(mask.sum(axis=1).mean()), share or 0.0))
    return curve


def detector_confusion(probabilities: Array, truth: Array) -> list[list[int]]:
    """(K, K) counts: rows a true task, columns the most probable one."""
    count = truth.shape[1]
    first = probabilities.argmax(axis=1)
    return [
        np.bincount(first[truth[:, k]], minlength=count).astype(int).tolist() for k in range(count)
    ]


def pixel_confusion(truth: Array, predicted: Array | None, num_classes: int) -> Array:
    """(n, n + 1) counts of one mask (H, W); `predicted` None counts every pixel as not decoded."""
    keep = truth != IGNORE
    answer = np.full_like(truth, num_classes) if predicted is None else predicted
    index = truth[keep].astype(np.int64) * (num_classes + 1) + answer[keep]
    counts = np.bincount(index, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def mean_iou(confusion: Array) -> float | None:
    """Mean intersection over union of the classes that occur, from (n, n + 1) pixel counts."""
    hits = np.diag(confusion[:, :-1]).astype(float)
    union = confusion.sum(axis=1) + confusion[:, :-1].sum(axis=0) - hits
    present = union > 0
    return float((hits[present] / union[present]).mean()) if present.any() else None


def _mean_average_precision(probabilities: Array, truth: Array) -> float | None:
    """Mean over the tasks that some image has; both are (N, K). None where there is none."""
    ranked = torch.from_numpy(np.asarray(probabilities, dtype=np.float32))
    target = torch.from_numpy(np.asarray(truth, dtype=np.int64))
    present = [k for k in range(truth.shape[1]) if target[:, k].any()]
    values = [float(binary_average_precision(ranked[:, k], target[:, k])) for k in present]
    return float(np.mean(values)) if values else None


def _sizes(records: ImageRecords, pixels: int) -> dict[str, float]:
    if records.wire_bytes is None or records.payload_bytes is None:
        return {}
    out = {
        "val/wire_bytes": float(records.wire_bytes.mean()),
        "val/payload_bytes": float(records.payload_bytes.mean()),
    }
    if records.session_bytes is not None:
        out["val/session_bytes"] = float(records.session_bytes.mean())
    out["val/bpp"] = out["val/wire_bytes"] * 8 / pixels
    out["val/payload_bpp"] = out["val/payload_bytes"] * 8 / pixels
    if records.estimated_bits is not None:
        out["val/estimated_bytes"] = float(records.estimated_bits.mean()) / 8
    return out


def _most_frequent(questions: Sequence[Array]) -> float | None:
    """The share of answers right, if each question always gets its most frequent label."""
    right = sum(int(np.bincount(labels).max()) for labels in questions if len(labels))
    return _share(right, sum(map(len, questions)))


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None
