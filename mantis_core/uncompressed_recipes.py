"""Recipes of networks that compress nothing: the teacher, and baselines trained on labels alone.

Shapes: B batch, K tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mantis_core.config import CodecTeacherConfig, LossTerm, TeacherConfig
from mantis_core.hits import label_hits
from mantis_core.image_codecs import IMAGE_CODECS
from mantis_core.preprocessing import normalise
from mantis_core.recipes import Recipe, StepOutput
from mantis_core.tasks import Batch, TaskSpec
from mantis_core.teacher import Teacher


class TeacherRecipe(Recipe):
    """Trains a teacher, flat or one head a task, on labels."""

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


class CodecTeacherRecipe(Recipe):
    """Fine-tunes a trained teacher on images that an image codec has coded and decoded."""

    def __init__(self, teacher: Teacher, config: CodecTeacherConfig) -> None:
        super().__init__(teacher.tasks, {"labels": LossTerm(criterion="FlatLabels")})
        self.student = teacher
        self.codec, self.qualities = IMAGE_CODECS[config.codec], config.qualities
        self.set_teacher(None)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        count, known = len(batch), len(self.qualities)
        drawn = torch.randint(known, (count,)) if self.training else torch.arange(count) % known
        pixels = batch.image.permute(0, 2, 3, 1).cpu().numpy()
        decoded = [
            self.codec.decode(self.codec.encode(image, self.qualities[i]))
            for image, i in zip(pixels, drawn.tolist(), strict=True)
        ]
        images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(batch.image.device)
        student = {"outputs": self.student(normalise(images))}
        loss, sums = self.total(student, {"outputs": {}}, batch)
        sums |= label_hits(student["outputs"], self.tasks, batch)
        return StepOutput(loss, sums, count)


class IndividualRecipe(Recipe):
    """One uncompressed network a task, all in one fit: the upper baseline of task accuracy."""

    def __init__(self, models: nn.ModuleDict, tasks: Sequence[TaskSpec]) -> None:
        super().__init__(tasks, {"labels": LossTerm(criterion="FlatLabels")})
        self.student = models
        self.set_teacher(None)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        images = normalise(batch.image)
        outputs: dict[str, Tensor] = {}
        for k, task in enumerate(self.tasks):
            key = f"logits/{task.name}"
            active = batch.task_mask[:, k]
            first = active.int().argsort(descending=True, stable=True)  # active images first
            rows = first[: max(2, int(active.sum()))]  # two at least: batch norm needs them
            own = self.student[task.name](images[rows])[key]  # type: ignore[index]
            full = own.new_zeros(len(batch), *own.shape[1:])
            outputs[key] = full.index_copy(0, rows, own)
        loss, sums = self.total({"outputs": outputs}, {"outputs": {}}, batch)
        sums |= label_hits(outputs, self.tasks, batch)
        return StepOutput(loss, sums, len(batch))


def individual_models(teacher: Teacher, image_size: tuple[int, int]) -> nn.ModuleDict:
    """One network a task, the teacher's trained backbone to start from."""
    models = nn.ModuleDict()
    for task in teacher.tasks:
        own = Teacher(teacher.name, split=teacher.split, tasks=(task,), image_size=image_size)
        own.backbone.load_state_dict(copy.deepcopy(teacher.backbone.state_dict()))
        models[task.name] = own
    return models
