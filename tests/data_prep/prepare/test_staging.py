"""The labels of one row."""

from __future__ import annotations

from data_prep.config import DataConfig, TaskConfig
from data_prep.manifest import TaskTable
from data_prep.prepare.staging import row_labels
from data_prep.tasks import resolve_tasks


def test_a_row_of_several_classes_has_no_single_class_label() -> None:
    data = DataConfig(sources=({"kind": "shapes"},))
    table: TaskTable = resolve_tasks(
        (
            TaskConfig(name="outline", classes_from="shapes"),
            TaskConfig(name="stroke", classes_from="shapes"),
        ),
        data,
    )
    labels = row_labels(["stroke/plus", "outline/square", "other"], [], table)
    assert labels.class_indices == [7, 1]
    assert labels.labels == [1, 3]
    assert labels.task_mask == [True, True]
