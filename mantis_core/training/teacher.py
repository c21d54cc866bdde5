"""The teacher: its own training on labels, and the frozen one that other stages distil."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mantis_core.config import LossTerm, TeacherConfig
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.teacher import Teacher, flat_teacher, load_backbone
from mantis_core.networks.weights import read_order, read_weights
from mantis_core.tasks import Batch, Problem
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Recipe, StepOutput


def new_teacher(config: TeacherConfig, problem: Problem) -> Teacher:
    """An untrained teacher: one flat head where each image has one class, else a head a task."""
    return Teacher(
        config.name,
        split=config.split,
        tasks=problem.tasks,
        flat_classes=len(problem.classes) if problem.single_class else 0,
        image_size=problem.image_size,
    )


def ready_teacher(
    config: TeacherConfig, problem: Problem, trained: Mapping[str, Tensor] | None
) -> Teacher:
    """The teacher to distil: `trained` by its own stage, pretrained by torchvision, or from a file.

    Where all tasks are segmentations, one of the last two has features and no answers. Raises
    ModelError if weights and data do not fit.
    """
    if config.weights == "train":
        assert trained is not None
        teacher = new_teacher(config, problem)
        teacher.load_state_dict(dict(trained))
        return teacher
    state = None if config.weights == "pretrained" else read_weights(config.weights)
    if not problem.classes:  # segmentations alone: a teacher of features, without a head
        teacher = Teacher(
            config.name,
            split=config.split,
            pretrained=state is None,
            image_size=problem.image_size,
        )
        if state is not None:
            load_backbone(teacher, state)
    else:
        teacher = flat_teacher(
            config.name,
            state,
            split=config.split,
            classes=problem.classes,
            class_names=problem.class_names,
            imagenet_indices=problem.imagenet_indices,
            order=read_order(config.classes, problem.classes) if config.classes else None,
            image_size=problem.image_size,
            source=config.weights,
        )
    teacher.tasks = tuple(problem.tasks)
    return teacher


def teacher_recipe(config: TeacherConfig, problem: Problem, *, seed: int) -> Recipe:
    """A teacher to train, from random weights or from the backbone in `config.start`."""
    torch.manual_seed(seed)
    teacher = new_teacher(config, problem)
    if config.start is not None:
        state = read_weights(config.start, field="teacher.start")
        load_backbone(teacher, state, config.start)
    return TeacherRecipe(teacher, config)


class TeacherRecipe(Recipe):
    """Trains a teacher on labels, with one flat head or a head for each task."""

    def __init__(self, teacher: Teacher, config: TeacherConfig) -> None:
        smoothing = {"label_smoothing": config.label_smoothing}
        super().__init__(
            teacher.tasks, {"labels": LossTerm(criterion="FlatLabels", kwargs=smoothing)}
        )
        self.student = teacher
        self.set_teacher(None)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        student = {"outputs": self.student(normalise(batch.image))}
        loss, sums = self.total(student, {"outputs": {}}, batch)
        sums |= label_hits(student["outputs"], self.tasks, batch)
        return StepOutput(loss, sums, len(batch))
