"""Turns a table of tasks or the manifest of a prepared folder into the Problem of mantis_core."""

from __future__ import annotations

from data_prep.config import DataConfig
from data_prep.imagenet import imagenet_wnids
from data_prep.manifest import Manifest, TaskTable
from mantis_core.tasks import Problem, TaskSpec


def problem_of(manifest: Manifest, short_side: int) -> Problem:
    """Returns tasks, classes and sizes of a prepared folder.

    `short_side` is the short side of its stored images in pixels.
    """
    return _problem(manifest, manifest.single_class, manifest.image_size, short_side)


def problem_of_table(table: TaskTable, data: DataConfig, single_class: bool) -> Problem:
    """Returns the same before there is a prepared folder.

    `single_class` says whether every image will have exactly one class.
    """
    return _problem(table, single_class, data.size, data.stored_short_side)


def tasks_of(described: Manifest | TaskTable) -> tuple[TaskSpec, ...]:
    """Returns the tasks of a manifest or a table, in order."""
    return tuple(
        TaskSpec(
            task.name, task.kind, task.num_classes, task.class_indices, task.labels, task.parent
        )
        for task in described.tasks
    )


def _problem(
    described: Manifest | TaskTable, single_class: bool, size: tuple[int, int], short_side: int
) -> Problem:
    position = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
    classes = described.classes
    indices = [position[class_id] for class_id in classes if class_id in position]
    return Problem(
        tasks=tasks_of(described),
        classes=classes,
        class_names=described.class_names,
        single_class=single_class,
        image_size=size,
        short_side=short_side,
        imagenet_indices=tuple(indices) if len(indices) == len(classes) else None,
    )
