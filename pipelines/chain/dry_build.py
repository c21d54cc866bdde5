"""Builds the networks of trainings without values, and computes a loss of each: shapes and costs.

Torch's device `meta` has shapes and no memory. A name, a split, a loss term or a size that does not
fit fails here within seconds, before anything is downloaded or trained. Legend of shapes: B batch,
H W pixels, K tasks.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.manifest import TaskTable
from mantis_core.config import SHIPPED, TeacherConfig, TrainingConfig
from mantis_core.errors import ModelError
from mantis_core.networks.bottleneck import Bottleneck, BottleneckOutput
from mantis_core.networks.cost import macs_of, step_cost
from mantis_core.tasks import Batch, Problem, class_members
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.teacher import Teacher, check_shipped, freeze
from mantis_core.training.recipe import Recipe
from mantis_core.training.stage1 import Stage1Student
from mantis_core.training.teacher import new_teacher, ready_teacher
from pipelines.chain.effort import Cost, held_bytes
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from pipelines.stages.spec import StageSpec
from pipelines.training.problem import problem_of_table

_Built = dict[str, Any]
IMAGES = 64  # so many that what a step keeps of weights, whatever its batch, hardly counts
IMAGENET_CLASSES = 1000
SHAPELESS = {*TrainingConfig.model_fields, "rate_weight", "rate_ramp_fraction", "teacher_forcing"}
"""Fields of a stage's section that no shape depends on."""


def check_networks(
    trainings: Sequence[StageSpec], table: TaskTable, *, single_class: bool
) -> dict[str, Cost]:
    """Returns what a step of each training costs, by the name of the stage.

    Leaves out those whose steps cannot be computed without values. Raises ModelError if the
    networks of a training cannot be built or do not fit each other. Trainings with the same
    networks are built once. `single_class` says whether every image has exactly one class. Reads
    the files in `teacher.weights` and `teacher.start`, and the package of `stage1.start`. Downloads
    nothing.
    """
    seen: dict[str, Cost | None] = {}
    built: _Built = {}
    for spec in trainings:
        shaping = _shaping(spec)
        if shaping not in seen:
            problem = problem_of_table(table, spec.settings.data, single_class)
            seen[shaping] = _step_cost(spec, problem, built)
    found = {spec.name: seen[_shaping(spec)] for spec in trainings}
    return {name: cost for name, cost in found.items() if cost is not None}


def client_macs(settings: Settings, table: TaskTable, *, single_class: bool) -> tuple[int, int]:
    """Returns the multiply-adds of the main arm's client for one image.

    The second are those that only detection needs.
    """
    problem = problem_of_table(table, settings.data, single_class)
    labels = [t.num_classes * t.is_classification for t in problem.tasks]
    return macs_of(
        settings.model,
        len(problem.tasks),
        problem.image_size,
        class_members(problem.tasks, len(problem.classes)) if single_class else None,
        labels if settings.model.exit_heads else (),
    )


def _step_cost(spec: StageSpec, problem: Problem, built: _Built) -> Cost | None:
    """Builds the recipe of a training and runs one batch through it. Raises ModelError."""
    require_row_of_blocks(spec.settings.teacher.name)
    with _without_values():
        try:
            recipe = _recipe(spec.kind, spec.settings, problem, built).to("meta").train()
            step = step_cost(recipe, lambda: recipe(_batch(problem), 0.0).loss)
            held = held_bytes(recipe, spec.training)
            recipe.zero_grad(set_to_none=True)
            return Cost(step.macs // IMAGES, step.saved_bytes // IMAGES, held)
        except RuntimeError as error:  # also NotImplementedError
            if _needs_values(error):
                return None  # it counts rows: its shapes are those of the other stages
            height, width = problem.image_size
            raise ModelError(
                f"{spec.name}: its networks do not fit each other at data.image_size {height} x "
                f"{width}, with teacher.split {spec.settings.teacher.split!r} and "
                f"model.encoder.stride {spec.settings.model.encoder.stride} ({error}): change one "
                "of the three, or the loss term that compares these outputs"
            ) from error


@functools.cache
def require_row_of_blocks(name: str) -> None:
    """Raises ModelError unless a teacher can have this network. Computes with random weights."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        Backbone(name)


@dataclass(frozen=True)
class _NoWeights:
    """Stands for the weights of stages that have not run: tensors of the right shapes.

    `built` keeps teachers and tensors for the other trainings of the same problem.
    """

    settings: Settings
    problem: Problem
    built: _Built

    def check(self, teacher: Teacher, settings: Settings, problem: Problem) -> None:
        """Does nothing: a teacher without values knows no image."""

    def teacher(self, settings: Settings, problem: Problem) -> Teacher:
        """Returns a teacher without values. Raises ModelError if a given file does not fit."""
        key = settings.teacher.model_dump_json()
        if key not in self.built:
            self.built[key] = _teacher(settings.teacher, problem)
        teacher: Teacher = self.built[key]
        freeze(teacher)
        return teacher

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Returns the tensors that the stage of this kind would ship."""
        key = kind + self.settings.model.model_dump_json()
        if key not in self.built:
            student = _recipe(kind, self.settings, self.problem, self.built).student
            self.built[key] = (
                student.shipped() if isinstance(student, Stage1Student) else student.state_dict()
            )
        tensors: dict[str, Tensor] = self.built[key]
        return tensors


def _teacher(config: TeacherConfig, problem: Problem) -> Teacher:
    if config.weights == "train":
        return new_teacher(config, problem)
    if config.weights not in SHIPPED:
        return ready_teacher(config, problem, None)
    check_shipped(config.name, config.weights, field="teacher.weights")
    classes = len(problem.classes)
    if classes and problem.imagenet_indices is None and classes != IMAGENET_CLASSES:
        raise ModelError(
            f"teacher.weights: {config.weights} has {IMAGENET_CLASSES} logits, the data has "
            f"{classes} classes. They are reduced to the data's where every class is a WordNet id "
            "of ImageNet-1k. Else set teacher.weights=train, with teacher.start="
            f"{config.weights} to begin with these features, or give a file with these classes"
        )
    size = problem.image_size
    teacher = Teacher(config.name, split=config.split, flat_classes=classes, image_size=size)
    teacher.tasks = problem.tasks
    return teacher


def _recipe(kind: str, settings: Settings, problem: Problem, built: _Built) -> Recipe:
    build = STAGES[kind].recipe
    assert build is not None
    start = settings.teacher.start
    if start in SHIPPED:  # of the network's own shapes, so nothing else is to check
        check_shipped(settings.teacher.name, start, field="teacher.start")
        teacher = settings.teacher.model_copy(update={"start": None})
        settings = settings.model_copy(update={"teacher": teacher})
    recipe = build(settings, problem, _NoWeights(settings, problem, built))
    for module in recipe.modules():
        if isinstance(module, Bottleneck):
            module.forward = _as_sent  # type: ignore[method-assign]
    return recipe


def _as_sent(
    latent: Tensor, mask: Tensor, primary: Tensor, shares: Tensor | None = None
) -> BottleneckOutput:
    """Stands for Bottleneck.forward, which counts images by their values."""
    return BottleneckOutput(latent, latent.new_zeros(len(latent)))


def _batch(problem: Problem) -> Batch:
    """Returns IMAGES images without values that carry every task."""
    size = problem.image_size
    numbers = torch.zeros(IMAGES, dtype=torch.int64)
    per_task = torch.zeros(IMAGES, len(problem.tasks), dtype=torch.int64)
    masks = [task.name for task in problem.tasks if not task.is_classification]
    return Batch(
        image=torch.zeros(IMAGES, 3, *size, dtype=torch.uint8),
        class_label=numbers,
        labels=per_task,
        task_mask=per_task.bool(),
        segmentation={name: torch.zeros(IMAGES, *size, dtype=torch.uint8) for name in masks},
        row_id=numbers,
    )


def _shaping(spec: StageSpec) -> str:
    """Returns what the shapes of a training's networks depend on, as text."""
    settings = spec.settings
    parts = (
        settings.teacher.model_dump_json(exclude={"training"}),
        settings.model.model_dump_json(),
        spec.training.model_dump_json(exclude=SHAPELESS),
        str(settings.data.size),
    )
    return "\n".join((spec.kind, *parts))


def _needs_values(error: RuntimeError) -> bool:
    return isinstance(error, NotImplementedError) or "meta" in str(error)


@contextmanager
def _without_values() -> Iterator[None]:
    """Makes new tensors without values, and keeps the random state and the log as they are."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the worker warns again
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("meta"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # "copying to a meta parameter is a no-op"
            yield
    finally:
        logging.disable(level)
