"""Stage `stage2`: trains the task-aware codec of every arm from the weights of stage 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.evaluation.arms import arm_settings
from pipelines.stages.spec import READER, Inputs, Stage
from pipelines.stages.train import run

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


def planned(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields the arms that train a stage 2, the main arm first."""
    for arm in inputs.arms:
        if arm.trains == "stage2":
            yield arm.suffix, arm_settings(settings, arm)


def recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the whole codec, or one codec for each task for the baseline `per_task`."""
    teacher = weights.teacher(settings, problem)
    own = (settings.stage2, settings.model, teacher, problem, weights.tensors("stage1"))
    if settings.model.per_task:
        from mantis_core.baselines.per_task import per_task_recipe

        return per_task_recipe(*own, seed=settings.seed)
    from mantis_core.training.stage2 import stage2_recipe

    return stage2_recipe(*own, seed=settings.seed)


STAGE2 = Stage(
    name="stage2",
    help="Train the task-aware codec of the main arm (stage 2).",
    planned=planned,
    after=("prepare", "teacher", "stage1"),
    reads=("seed", *READER, "model", "stage2"),
    code=("pipelines.stages.stage2", "pipelines.training.worker"),
    section="stage2",
    recipe=recipe,
    run=run,
)
