"""The stages of baselines with a training of their own: `individual` and `codec_teacher`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.evaluation.arms import arm_settings
from pipelines.stages.spec import READER, Inputs, Stage
from pipelines.stages.teacher import given_weights
from pipelines.stages.train import run

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


def individual_arms(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields one stage for each seed if `evaluate.baselines` names `individual`."""
    for arm in inputs.arms:
        if arm.trains == "individual":
            yield arm.suffix, arm_settings(settings, arm)


def individual_recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds one uncompressed network for each task."""
    from mantis_core.baselines import uncompressed

    teacher = weights.teacher(settings, problem)
    return uncompressed.individual_recipe(teacher, problem, seed=settings.seed)


def codec_arms(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields one stage for each image codec with a fine-tuned teacher. Its qualities share it."""
    seen: set[str] = set()
    for arm in inputs.arms:
        stage, _, codec = arm.stage.partition("/")
        if stage == "codec_teacher" and codec not in seen:
            seen.add(codec)
            yield codec, arm_settings(settings, arm)


def codec_recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the teacher that is fine-tuned on the decoded images of an image codec."""
    from mantis_core.baselines import uncompressed

    teacher = weights.teacher(settings, problem)
    return uncompressed.codec_teacher_recipe(settings.codec_teacher, teacher)


CODE = ("pipelines.stages.baselines", "pipelines.training.worker")

INDIVIDUAL = Stage(
    name="individual",
    planned=individual_arms,
    after=("prepare", "teacher"),
    reads=("seed", *READER, "teacher.name", "teacher.split", "individual"),
    identities=given_weights,
    code=CODE,
    section="individual",
    recipe=individual_recipe,
    run=run,
)
CODEC_TEACHER = Stage(
    name="codec_teacher",
    planned=codec_arms,
    after=("prepare", "teacher"),
    reads=("seed", *READER, "teacher.name", "teacher.split", "codec_teacher"),
    identities=given_weights,
    code=CODE,
    section="codec_teacher",
    recipe=codec_recipe,
    run=run,
)
