"""The tasks of a prepared data set as mantis_core takes them. Light: imports no model."""

from __future__ import annotations

from data_prep.schema import Manifest
from mantis_core.tasks import TaskSpec


def tasks_of(manifest: Manifest) -> tuple[TaskSpec, ...]:
    """The manifest's tasks, in order."""
    return tuple(
        TaskSpec(task.name, task.kind, task.num_classes, task.class_indices, task.labels)
        for task in manifest.tasks
    )
