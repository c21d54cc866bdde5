"""Tasks and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mantis_core.tasks import Batch, TaskSpec, class_slots


def arrays() -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((2, 3, 4, 4), np.uint8),
        "class_label": np.array([0, -1]),
        "labels": np.array([[0, -1], [-1, 1]]),
        "task_mask": np.array([[True, False], [False, True]]),
        "segmentation/road": np.ones((2, 4, 4), np.uint8),
        "row_id": np.array([7, 9]),
    }


def test_a_class_in_two_tasks_has_a_slot_in_each() -> None:
    tasks = [
        TaskSpec("a", "classification", 2, (2, 0)),
        TaskSpec("road", "segmentation", 5),
        TaskSpec("b", "classification", 2, (0, 1)),
    ]
    # Labels end to end: a: 2 -> place 0, 0 -> place 1; b: 0 -> place 2, 1 -> place 3; 4 is none.
    assert class_slots(tasks, 3).tolist() == [[1, 2], [3, 4], [0, 4]]


def test_a_class_of_no_task_has_only_the_unused_slot() -> None:
    assert class_slots([TaskSpec("a", "classification", 1, (1,))], 2).tolist() == [[1], [0]]


def test_a_batch_is_made_of_the_readers_arrays() -> None:
    batch = Batch.from_arrays(arrays())
    assert len(batch) == 2
    assert list(batch.segmentation) == ["road"]
    assert batch.task_mask.dtype == torch.bool
    assert batch.row_id.tolist() == [7, 9]


def test_read_only_arrays_are_copied_not_shared() -> None:
    given = arrays()
    given["image"].flags.writeable = False
    batch = Batch.from_arrays(given)
    batch.image.fill_(5)
    assert given["image"].max() == 0


@pytest.mark.parametrize(("kind", "expected"), [("classification", True), ("segmentation", False)])
def test_a_task_knows_its_kind(kind: str, expected: bool) -> None:
    assert TaskSpec("t", kind, 2).is_classification is expected  # type: ignore[arg-type]
