"""From what was decoded of every image to the figures of an arm, by hand on four images."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mantis_core.measure.metrics import (
    ImageRecords,
    chance,
    detection_curve,
    detection_figures,
    detector_confusion,
    figures,
    figures_without_labels,
    mean_iou,
    pixel_confusion,
)
from mantis_core.tasks import IGNORE, TaskSpec

TASKS = (
    TaskSpec("pets", "classification", 2, (0, 1), ("cat", "dog")),
    TaskSpec("food", "classification", 2, (2, 3), ("pie", "jam")),
)
# Images: a cat named, a dog whose task was not sent, a pie taken for jam, jam decoded and outvoted.
RECORDS = ImageRecords(
    class_label=np.array([0, 1, 2, 3]),
    labels=np.array([[0, -1], [1, -1], [-1, 0], [-1, 1]]),
    task_mask=np.array([[True, False], [True, False], [False, True], [False, True]]),
    class_index=np.array([0, 3, 3, 0]),
    predicted=np.array([[0, -1], [-1, 1], [-1, 1], [0, 1]]),
    decoded=np.array([[True, False], [False, True], [False, True], [True, True]]),
    probabilities=np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.8], [0.5, 0.45]], dtype=np.float32),
    wire_bytes=np.array([40, 60, 80, 100]),
    payload_bytes=np.array([30.0, 50.0, 70.0, 90.0]),
    estimated_bits=np.array([240.0, 400.0, 560.0, 720.0]),
)


def test_top1_is_end_to_end_and_a_task_is_judged_where_it_was_decoded():
    found = figures(RECORDS, TASKS, single_class=True, pixels=1000)
    assert found["val/top1"] == 0.25  # the cat alone
    assert found["val/task_top1"] == 0.5  # the cat, and the jam that the joint decision outvoted
    assert found["val/task/pets/decoded"] == 0.5
    assert found["val/task/pets/top1"] == 1.0
    assert found["val/task/food/decoded"] == 1.0
    assert found["val/task/food/top1"] == 0.5


def test_parents_and_children_have_figures_of_their_own():
    kind = TaskSpec("kind", "classification", 2, (4, 5), ("pets", "food"))
    tasks = (kind, *(replace(task, parent="kind") for task in TASKS))
    beside = {
        "labels": np.column_stack([[0, 0, 1, 1], RECORDS.labels]),
        "task_mask": np.column_stack([[True] * 4, RECORDS.task_mask]),
        "predicted": np.column_stack([[0, 1, 1, 0], RECORDS.predicted]),
        "decoded": np.column_stack([[True] * 4, RECORDS.decoded]),
        "probabilities": None,
    }
    found = figures(replace(RECORDS, **beside), tasks, single_class=False, pixels=1000)
    assert found["val/parents/top1"] == 0.5
    assert found["val/children/top1"] == 0.5
    assert found["val/top1"] == 0.5
    sent = {**beside, "probabilities": np.full((4, 3), 0.5), "sent": np.ones((4, 3), bool)}
    detected = figures(replace(RECORDS, **sent), tasks, single_class=False, pixels=1000)
    assert detected["val/detection/active_tasks"] == 3  # what is sent, not what is answered
    assert "val/parents/top1" not in figures(RECORDS, TASKS, single_class=True, pixels=1000)


def test_sizes_are_means_and_bits_are_of_the_wire():
    found = figures(RECORDS, TASKS, single_class=True, pixels=1000)
    assert found["val/wire_bytes"] == 70
    assert found["val/payload_bytes"] == 60
    assert found["val/estimated_bytes"] == 60
    assert found["val/bpp"] == pytest.approx(0.56)
    assert found["val/payload_bpp"] == pytest.approx(0.48)
    assert found["val/task/pets/wire_bytes"] == 50
    assert found["val/task/food/wire_bytes"] == 90


def test_detection_counts_masks_and_ranks():
    found = figures(RECORDS, TASKS, single_class=True, pixels=1000)
    assert found["val/detection/exact_match"] == 0.5
    assert found["val/detection/coverage"] == 0.75
    assert found["val/detection/active_tasks"] == 1.25
    assert found["val/detection/first"] == 0.5
    assert found["val/detection/top1_if_right"] == 0.5  # the cat named, the pie not
    assert found["val/detection/top1_if_wrong"] == 0.0
    # pets ranked 0.9 (true), 0.5 (not), 0.4 (true); food 0.8 (true), 0.6 (not), 0.45 (true)
    precision = (1 + 2 / 3) / 2
    assert found["val/detection/mean_average_precision"] == pytest.approx(precision)


def test_an_arm_that_sends_and_detects_nothing_has_no_such_figures():
    teacher = replace(
        RECORDS, probabilities=None, wire_bytes=None, payload_bytes=None, estimated_bits=None
    )
    found = figures(teacher, TASKS, single_class=True, pixels=1000)
    assert not [name for name in found if "bytes" in name or "bpp" in name or "detection" in name]


def test_with_several_labels_an_image_top1_is_of_pairs():
    found = figures(RECORDS, TASKS, single_class=False, pixels=1000)
    assert found["val/top1"] == found["val/task_top1"] == 0.5


def test_the_confusion_is_of_the_most_probable_task():
    assert RECORDS.probabilities is not None
    assert detector_confusion(RECORDS.probabilities, RECORDS.task_mask) == [[1, 1], [1, 1]]


def test_a_lower_threshold_keeps_more_of_the_truth_at_more_tasks():
    assert RECORDS.probabilities is not None
    curve = detection_curve(RECORDS.probabilities, RECORDS.task_mask)
    assert curve[0] == (1.0, 0.5)  # above 1/2 only the most probable: two of four are right
    assert curve[-1] == (2.0, 1.0)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(curve))


def test_pixels_that_were_not_decoded_are_wrong_and_ignored_ones_do_not_count():
    truth = np.array([[0, 0], [1, IGNORE]], np.uint8)
    said = pixel_confusion(truth, np.array([[0, 1], [1, 1]], np.uint8), 2)
    assert said.tolist() == [[1, 1, 0], [0, 1, 0]]
    silent = pixel_confusion(truth, None, 2)
    assert silent.tolist() == [[0, 0, 2], [0, 0, 1]]
    assert mean_iou(said) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert mean_iou(said + silent) == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert mean_iou(np.zeros((2, 3))) is None


def test_what_the_client_answered_is_counted_apart():
    records = replace(RECORDS, answered=np.array([True, False, True, False]))
    found = figures(records, TASKS, single_class=True, pixels=1000)
    assert found["val/answered"] == 0.5
    assert found["val/answered_top1"] == 0.5  # the cat; not the pie
    plain = figures(RECORDS, TASKS, single_class=True, pixels=1000)
    assert found["val/top1"] == plain["val/top1"]
    assert "val/answered" not in plain


def by_hand(p: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The detection figures, counted image by image without a library."""
    images, count = truth.shape
    precisions = []
    for k in range(count):
        positives, area, found_before = sum(truth[:, k]), 0.0, 0
        for threshold in sorted(set(p[:, k].tolist()), reverse=True):
            kept = [i for i in range(images) if p[i, k] >= threshold]
            found = sum(bool(truth[i, k]) for i in kept)
            area += (found - found_before) * found / len(kept)
            found_before = found
        if positives:
            precisions.append(area / positives)
    both = sum(bool(mask[i, k] and truth[i, k]) for i in range(images) for k in range(count))
    out = {
        "exact_match": sum((mask[i] == truth[i]).all() for i in range(images)) / images,
        "active_tasks": mask.sum() / images,
        "first": sum(bool(truth[i, max(range(count), key=p[i].item)]) for i in range(images))
        / images,
    }
    if mask.sum() + truth.sum():
        out["micro_f1"] = 2 * both / (mask.sum() + truth.sum())
    if truth.sum():
        out["coverage"] = both / truth.sum()
        out["mean_average_precision"] = sum(precisions) / len(precisions)
    return {f"val/detection/{name}": float(value) for name, value in out.items()}


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("seed", range(5))
def test_detection_figures_are_those_counted_by_hand(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=(17, count)) < rng.choice([0.0, 0.2, 0.9], size=count)
    p = rng.choice([0.05, 0.25, 0.5, 0.75, 1.0], size=(17, count)).astype(np.float32)  # with ties
    mask = p > rng.choice([0.1, 0.4, 0.9])
    assert detection_figures(p, mask, truth) == pytest.approx(by_hand(p, mask, truth))


def test_figures_over_true_tasks_are_left_out_where_no_image_has_one():
    p, mask = np.array([[0.9], [0.8]], np.float32), np.ones((2, 1), bool)
    found = detection_figures(p, mask, np.zeros((2, 1), bool))
    assert found == by_hand(p, mask, np.zeros((2, 1), bool))
    assert "val/detection/coverage" not in found
    assert np.isfinite(list(found.values())).all()


def test_one_task_has_every_figure():
    one = replace(
        RECORDS,
        class_label=np.array([0, 1, 1, 0]),
        class_index=np.array([0, 1, 0, 0]),
        labels=np.array([[0], [1], [1], [0]]),
        task_mask=np.ones((4, 1), bool),
        predicted=np.array([[0], [1], [0], [0]]),
        decoded=np.ones((4, 1), bool),
        probabilities=np.array([[0.9], [0.4], [0.1], [0.5]], np.float32),
    )
    found = figures(one, TASKS[:1], single_class=True, pixels=1000)
    assert found["val/top1"] == found["val/task_top1"] == found["val/task/pets/top1"] == 0.75
    for name in ("exact_match", "micro_f1", "coverage", "mean_average_precision", "first"):
        assert found[f"val/detection/{name}"] == 1.0
    assert found["val/detection/top1_if_right"] == 0.75
    assert detector_confusion(one.probabilities, one.task_mask) == [[4]]
    assert set(detection_curve(one.probabilities, one.task_mask)) == {(1.0, 1.0)}


def test_segmentations_alone_have_a_mean_iou_in_the_place_of_top1():
    tasks = (TaskSpec("ground", "segmentation", 2), TaskSpec("sky", "segmentation", 2))
    records = ImageRecords(
        class_label=np.full(2, -1),
        labels=np.full((2, 2), -1),
        task_mask=np.ones((2, 2), bool),
        class_index=np.full(2, -1),
        predicted=np.full((2, 2), -1),
        decoded=np.ones((2, 2), bool),
        probabilities=np.full((2, 2), 0.9, np.float32),
        confusion={"ground": np.array([[2, 2, 0], [0, 4, 0]]), "sky": np.array([[4, 0, 0]] * 2)},
    )
    found = figures(records, tasks, single_class=False, pixels=1000)
    assert found["val/task/ground/miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["val/task/sky/miou"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["val/miou"] == pytest.approx((7 / 12 + 1 / 4) / 2)
    assert not [name for name in found if "top1" in name]
    mixed = figures(
        replace(records, confusion={"sky": records.confusion["sky"]}),
        (TASKS[0], tasks[1]),
        single_class=False,
        pixels=1000,
    )
    assert "val/miou" not in mixed


def test_chance_is_what_the_most_frequent_answer_brings():
    one = replace(RECORDS, class_label=np.array([0, 1, 1, -1]))
    assert chance(one, TASKS, single_class=True) == pytest.approx(2 / 3)
    pairs = replace(
        RECORDS,
        labels=np.array([[0, 2], [0, 2], [1, 2], [-1, 0]]),
        task_mask=np.array([[1, 1], [1, 1], [1, 0], [0, 1]], bool),
    )
    assert chance(pairs, TASKS[:1], single_class=False) == pytest.approx(2 / 3)
    none = (TaskSpec("ground", "segmentation", 2),)
    assert chance(pairs, none, single_class=False) is None


def test_agreement_compares_with_the_teacher_and_reads_no_label():
    """The teacher takes the dog for a cat and the pie for jam, and knows an image without class."""
    records = replace(
        RECORDS,
        class_label=np.array([0, 1, 2, -1]),
        labels=np.array([[0, -1], [1, -1], [-1, 0], [-1, -1]]),
        teacher_class=np.array([0, 0, 3, 0]),
        teacher_predicted=np.array([[0, 1], [0, 1], [1, 1], [0, 0]]),
    )
    found = figures(records, TASKS, single_class=True, pixels=1000)
    assert found["val/agreement"] == 0.75  # all but the dog, whose task was not decoded
    assert found["val/task/pets/agreement"] == 0.5
    assert found["val/task/food/agreement"] == 0.5  # the pie; the last image has another label
    pairs = figures(records, TASKS, single_class=False, pixels=1000)
    assert pairs["val/agreement"] == 0.5
    silent = replace(records, class_index=np.full(4, -1))  # as individual models
    assert figures(silent, TASKS, single_class=True, pixels=1000)["val/agreement"] == 0.5


def test_agreement_is_left_out_where_the_teacher_says_nothing():
    assert not [n for n in figures(RECORDS, TASKS, single_class=True, pixels=9) if "agree" in n]
    heads = replace(RECORDS, teacher_predicted=np.array([[0, -1], [1, -1], [-1, -1], [-1, -1]]))
    found = figures(heads, TASKS, single_class=False, pixels=1000)
    assert found["val/agreement"] == found["val/task/pets/agreement"] == 0.5
    assert "val/task/food/agreement" not in found


def test_figures_without_labels_are_agreement_sizes_and_costs():
    records = replace(RECORDS, teacher_class=np.array([0, 0, 3, 0]), client_macs=7)
    kept = figures_without_labels(figures(records, TASKS, single_class=True, pixels=1000))
    sizes = {f"val/{name}" for name in ("wire_bytes", "payload_bytes", "estimated_bytes")}
    of_tasks = {f"val/task/{task.name}/wire_bytes" for task in TASKS}
    others = {"val/agreement", "val/client_macs", "val/detection/active_tasks"}
    assert set(kept) == {"val/bpp", "val/payload_bpp", *sizes, *of_tasks, *others}
