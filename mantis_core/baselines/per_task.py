"""The baseline of one codec for each task, all trained in one fit: the task is known, not detected.

Shapes: B batch, K tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.codec.checkpoint import read_spec
from mantis_core.codec.mantis import Mantis
from mantis_core.config import Stage2Config
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder, save_folder
from mantis_core.networks.blocks import TaskModules
from mantis_core.tasks import Batch, Problem, TaskSpec, of_task
from mantis_core.teachers.teacher import Teacher, freeze, narrowed
from mantis_core.training.means import Mean, Objective
from mantis_core.training.recipe import Measured, Recipe, model_in_training, without_detection
from mantis_core.training.stage2 import Stage2Recipe, started_codec


def per_task_recipe(
    config: Stage2Config,
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    stage1: Mapping[str, Tensor],
    *,
    seed: int,
) -> Recipe:
    """A codec for each task, from stage 1's weights; what only detection needs is frozen.

    Raises ModelError if every loss term is one of detection.
    """
    torch.manual_seed(seed)
    losses = without_detection(config.losses)
    if not losses:
        raise ModelError("stage2.losses: codecs of one task each need a term that is no detection")
    config = config.model_copy(update={"losses": losses})
    model = model_in_training(model, config).model_copy(
        update={
            "per_task": False,
            "send_probabilities": False,
            "detector": model.detector.model_copy(update={"classes": False}),
        }
    )
    parts = {}
    for task in problem.tasks:
        known = narrowed(teacher, task)
        codec, loaded = started_codec(
            model, known, of_task(problem, task), stage1, rates=config.rate_weights
        )
        freeze(codec.client.for_detection_alone())
        own = config
        if not task.is_classification:  # it has no exit head
            kept = {n: t for n, t in losses.items() if t.criterion != "ExitAnswers"}
            own = config.model_copy(update={"losses": kept})
        parts[task.name] = Stage2Recipe(codec, known, own, loaded=loaded)
    return PerTaskRecipe(parts, problem.tasks)


class PerTaskCodecs(TaskModules):
    """A codec for each task, under its name; its classes are the labels of that task, in order."""

    def finish(self) -> None:
        """Makes the tables of every codec and rounds its client; training is over."""
        for _, codec in self.items():
            codec.finish()  # type: ignore[operator]


class PerTaskRecipe(Recipe):
    """Stage 2 of each task's codec on the images of that task, all in one fit.

    The loss is a mean over the images of the batch; an image of several tasks counts for each.
    """

    def __init__(self, parts: Mapping[str, Stage2Recipe], tasks: tuple[TaskSpec, ...]) -> None:
        """`parts` by task, in the order of `tasks`."""
        super().__init__(tasks, {})
        self.student: PerTaskCodecs = PerTaskCodecs(
            {name: part.student for name, part in parts.items()}
        )
        self.parts = TaskModules(parts)
        self.loaded = {f"{name}.{own}" for name, part in parts.items() for own in part.loaded}
        self.held_levels = next(iter(parts.values())).held_levels

    def train(self, mode: bool = True) -> Self:
        """Switches the mode of all parts, each with the codec that the student holds now."""
        for name, part in self.parts.items():
            part.student = self.student[name]
        super().train(mode)
        return self

    def measure(self, batch: Batch, progress: float) -> Measured:
        objectives: list[Objective] = []
        sums: dict[str, Tensor] = {}
        for k, task in enumerate(self.tasks):
            part: Any = self.parts[task.name]
            part.student, part.level = self.student[task.name], self.level
            # A task that no image carries is in the graph all the same, or other workers wait.
            carried = batch.task_mask[:, k].nonzero()[:, 0]
            rows = carried if len(carried) else carried.new_zeros(1)
            (objective,), own = part.measure(_own_rows(batch, rows, k, task), progress)
            share = batch.task_mask[:, k].float().mean()
            carries = int(len(carried) > 0)
            counted = objective.mapped(lambda mean, n=carries: Mean(mean.value, n * mean.count))
            objectives.append(replace(counted, share=Mean(share, len(batch)), name=task.name))
            for name, value in own.items():
                if not name.startswith("detection/"):
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * carries
        return Measured(tuple(objectives), sums)

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Makes the tables of all codecs and writes them, as kind "per_task" whatever `kind` is."""
        assert isinstance(student, PerTaskCodecs)
        student.finish()
        save_codecs(folder, student, meta)


def save_codecs(folder: str | Path, codecs: PerTaskCodecs, meta: Mapping[str, Any]) -> None:
    """Writes finished codecs as one model folder."""
    specs = {name: codec.spec.model_dump(mode="json") for name, codec in codecs.items()}  # type: ignore[union-attr,operator]
    save_folder(folder, codecs.state_dict(), {"kind": "per_task", "codecs": specs}, meta)


def load_codecs(folder: str | Path) -> PerTaskCodecs:
    """What `save_codecs` wrote, in eval mode on CPU. Raises ModelError if it is something else."""
    tensors, config, _ = load_folder(folder)
    try:
        specs = {name: read_spec(spec) for name, spec in dict(config["codecs"]).items()}
        codecs = PerTaskCodecs({name: Mantis(spec) for name, spec in specs.items()})
        codecs.load_state_dict(tensors)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no codecs of one task each: {error}") from None
    return codecs.eval()


def _own_rows(batch: Batch, rows: Tensor, k: int, task: TaskSpec) -> Batch:
    """Rows of a batch with task `k` alone, whose labels are the classes."""
    labels = batch.labels[rows, k]
    masks = {} if task.is_classification else {task.name: batch.segmentation[task.name][rows]}
    return Batch(
        image=batch.image[rows],
        class_label=labels if task.is_classification else torch.full_like(labels, -1),
        labels=labels[:, None],
        task_mask=batch.task_mask[rows, k : k + 1],
        segmentation=masks,
        row_id=batch.row_id[rows],
    )
