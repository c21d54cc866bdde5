"""What a prepared data set asks of a model: manifest and settings to mantis_core's plain values."""

from __future__ import annotations

from data_prep.imagenet import imagenet_wnids
from data_prep.schema import DataConfig, Manifest
from mantis_core.build import Problem
from pipelines.task_specs import tasks_of


def problem_of(manifest: Manifest, data: DataConfig) -> Problem:
    """Tasks, classes and sizes of a prepared folder, as mantis_core takes them."""
    position = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
    indices = [position[class_id] for class_id in manifest.classes if class_id in position]
    return Problem(
        tasks=tasks_of(manifest),
        classes=manifest.classes,
        class_names=manifest.class_names,
        single_class=manifest.single_class,
        image_size=manifest.image_size,
        short_side=data.stored_short_side,
        imagenet_indices=tuple(indices) if len(indices) == len(manifest.classes) else None,
    )
