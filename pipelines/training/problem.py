"""Turns the manifest of a prepared folder into the tasks and the Problem of mantis_core."""

from __future__ import annotations

from data_prep.imagenet import imagenet_wnids
from data_prep.manifest import Manifest
from mantis_core.tasks import Problem, TaskSpec


def problem_of(manifest: Manifest, short_side: int) -> Problem:
    """Returns tasks, classes and sizes of a prepared folder.

    `short_side` is the short side of its stored images in pixels.
    """
    position = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
    indices = [position[class_id] for class_id in manifest.classes if class_id in position]
    return Problem(
        tasks=tasks_of(manifest),
        classes=manifest.classes,
        class_names=manifest.class_names,
        single_class=manifest.single_class,
        image_size=manifest.image_size,
        short_side=short_side,
        imagenet_indices=tuple(indices) if len(indices) == len(manifest.classes) else None,
    )


def tasks_of(manifest: Manifest) -> tuple[TaskSpec, ...]:
    """Returns the tasks of the manifest, in order."""
    return tuple(
        TaskSpec(task.name, task.kind, task.num_classes, task.class_indices, task.labels)
        for task in manifest.tasks
    )
