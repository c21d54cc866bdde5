"""Stage `stage1`: trains a task-agnostic codec in front of the teacher's frozen tail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.evaluation.arms import overridden
from pipelines.settings.arms import ARM_KINDS
from pipelines.stages.spec import READER, Inputs, Stage
from pipelines.stages.teacher import given_weights
from pipelines.stages.train import run

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


def planned(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields the stage for all arms, and one for each kind of arm that has another client."""
    yield "", settings
    for name in dict.fromkeys(arm.kind for arm in inputs.arms):
        kind = ARM_KINDS[name]
        if kind.own_stage1:
            yield name, overridden(settings, kind.overrides)


def recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the student in front of the teacher's tail. ModelError for a teacher that guesses."""
    from mantis_core.training.stage1 import stage1_recipe

    teacher = weights.teacher(settings, problem)
    weights.check(teacher, settings, problem)
    return stage1_recipe(settings.stage1, settings.model, teacher, problem, seed=settings.seed)


STAGE1 = Stage(
    name="stage1",
    help="Train the task-agnostic codec (stage 1).",
    planned=planned,
    after=("prepare", "teacher"),
    reads=(
        "seed",
        *READER,
        "teacher.name",
        "teacher.split",
        "model.client",
        "model.stem",
        "model.detector",
        "model.encoder",
        "model.decoder.channels",
        "model.decoder.blocks",
        "model.quantizer",
        "model.neighbour_contexts",
        "model.wide_encoder",
        "model.requests",
        "stage1",
    ),
    identities=given_weights,
    code=("pipelines.stages.stage1", "pipelines.training.worker", "mantis_core.training.stage1"),
    section="stage1",
    recipe=recipe,
    run=run,
)
