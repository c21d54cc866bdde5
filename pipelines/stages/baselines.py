"""The stages of baselines with a training of their own, beside those with a stage 2."""

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


def local_arms(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields one stage for each seed if `evaluate.baselines` names `local`.

    It trains as stage 1 does, for the epochs of both stages.
    """
    for arm in inputs.arms:
        if arm.trains == "local":
            own = arm_settings(settings, arm)
            epochs = own.stage1.epochs + own.stage2.epochs
            stage1 = own.stage1.model_copy(update={"epochs": epochs})
            yield arm.suffix, own.model_copy(update={"stage1": stage1})


def local_recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the classifier of the client's multiply-adds."""
    from mantis_core.baselines import local

    teacher = weights.teacher(settings, problem)
    return local.local_recipe(
        settings.model, teacher, problem, seed=settings.seed, start=settings.stage1.start
    )


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

LOCAL = Stage(
    name="local",
    planned=local_arms,
    after=("prepare", "teacher"),
    reads=(
        "seed",
        *READER,
        "teacher.name",
        "teacher.split",
        "model.client",
        "model.stem",
        "model.detector",
        "model.conditioning",
        "model.encoder",
        "model.requests",
        "model.exit_heads",
        *(
            f"stage1.{name}"
            for name in ("epochs", "batch_size", "optim", "ema_decay", "amp", "start")
        ),
    ),
    identities=given_weights,
    code=CODE,
    section="stage1",
    recipe=local_recipe,
    run=run,
)
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
