"""Baselines that compress nothing: a teacher tuned on decoded images, a network for each task.

Shapes: B batch, K tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mantis_core.baselines.image_codecs import IMAGE_CODECS, coded_at
from mantis_core.config import CodecTeacherConfig, LossTerm
from mantis_core.networks.blocks import TaskModules
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.server import still_batch_norms
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe


class CodecTeacherRecipe(Recipe):
    """Fine-tunes a trained teacher on images that an image codec has coded and decoded."""

    def __init__(self, teacher: Teacher, config: CodecTeacherConfig) -> None:
        super().__init__(teacher.tasks, {"labels": LossTerm(criterion="FlatLabels")})
        self.student = teacher
        self.codec = IMAGE_CODECS[config.codec]
        self.ways = list(product(config.qualities, config.scales))
        self.set_teacher(None)

    def measure(self, batch: Batch, progress: float) -> Measured:
        known = len(self.ways)
        drawn = torch.randint(known, (len(batch),)) if self.training else batch.row_id % known
        pixels = batch.image.permute(0, 2, 3, 1).cpu().numpy()
        decoded = [
            coded_at(self.codec, image, *self.ways[i])[1]
            for image, i in zip(pixels, drawn.tolist(), strict=True)
        ]
        images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(batch.image.device)
        student = {"outputs": self.student(normalise(images))}
        objective = self.objective(student, {"outputs": {}}, batch)
        return Measured((objective,), label_hits(student["outputs"], self.tasks, batch))


class IndividualRecipe(Recipe):
    """An uncompressed network for each task, all in one fit: an upper bound of task accuracy.

    Batch norms keep the teacher's statistics, as in the server's trunk: a step has a handful of
    images of each task, too few for statistics of their own.
    """

    def __init__(self, models: TaskModules, tasks: Sequence[TaskSpec]) -> None:
        super().__init__(tasks, {"labels": LossTerm(criterion="FlatLabels")})
        self.student = models
        self.set_teacher(None)

    def train(self, mode: bool = True) -> Self:
        """Switches the mode; batch norms stay in eval mode."""
        super().train(mode)
        still_batch_norms(self.student)
        return self

    def measure(self, batch: Batch, progress: float) -> Measured:
        images = normalise(batch.image)
        outputs: dict[str, Tensor] = {}
        for k, task in enumerate(self.tasks):
            key = f"logits/{task.name}"
            active = batch.task_mask[:, k]
            first = active.int().argsort(descending=True, stable=True)  # active images first
            rows = first[: max(1, int(active.sum()))]  # one at least, or other workers wait
            own = self.student[task.name](images[rows])[key]  # type: ignore[index]
            full = own.new_zeros(len(batch), *own.shape[1:])
            outputs[key] = full.index_copy(0, rows, own)
        objective = self.objective({"outputs": outputs}, {"outputs": {}}, batch)
        return Measured((objective,), label_hits(outputs, self.tasks, batch))


def individual_models(teacher: Teacher, image_size: tuple[int, int]) -> TaskModules:
    """A network for each task, with a copy of the teacher's backbone to start from."""
    models = TaskModules()
    for task in teacher.tasks:
        own = Teacher(teacher.name, split=teacher.split, tasks=(task,), image_size=image_size)
        own.backbone.load_state_dict(copy.deepcopy(teacher.backbone.state_dict()))
        models[task.name] = own
    return models


def codec_teacher_recipe(config: CodecTeacherConfig, teacher: Teacher) -> Recipe:
    """The baseline of a trained `teacher` that is fine-tuned on decoded images."""
    return CodecTeacherRecipe(teacher.requires_grad_(True), config)


def individual_recipe(teacher: Teacher, problem: Problem, *, seed: int) -> Recipe:
    """The uncompressed baseline of a network for each task."""
    torch.manual_seed(seed)
    return IndividualRecipe(individual_models(teacher, problem.image_size), problem.tasks)
