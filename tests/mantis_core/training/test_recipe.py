"""What holds for the recipes of both stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig, ModelConfig
from mantis_core.config import LossTerm, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.tasks import Batch, Problem
from mantis_core.training.recipe import Recipe, rate_weight
from tests.mantis_core.recipe_checks import without_gradient


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_the_teacher_stays_in_eval_mode(
    stage: str, problem: Problem, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(stage)(problem)
    recipe.train()
    assert recipe.training
    assert recipe.student.training
    assert not any(module.training for module in recipe.teacher.modules())


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_a_detector_of_classes_is_trained_in_both_stages_on_images_of_no_class_too(
    stage: str,
    request: pytest.FixtureRequest,
    problem: Problem,
    batch: Batch,
    small_config: Callable[..., ModelConfig],
) -> None:
    model = small_config(
        detector=DetectorConfig(channels=8, blocks=0, hidden=8, classes=True),
        conditioning=ConditioningConfig(kind="attention", hidden=8),
    )
    label = batch.class_label.clone()
    label[0] = -1
    mixed = replace(
        batch,
        class_label=label,
        labels=batch.labels.where(label[:, None] >= 0, torch.tensor(-1)),
        task_mask=batch.task_mask & (label[:, None] >= 0),
    )
    losses = {
        "classes": LossTerm(criterion="ClassDetection"),
        "logits": LossTerm(criterion="TeacherLogits"),
    }
    if stage == "stage2_of":
        losses = {**Stage2Config().losses, "classes": LossTerm(criterion="ClassDetection")}
    recipe = request.getfixturevalue(stage)(problem, model, losses=losses).train()
    output = recipe(mixed, 0.5)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert without_gradient(recipe) == []
    assert recipe.student.client.detector.mlp[-1].bias.grad[-1].abs() > 0


def hooks_of(recipe: Recipe) -> int:
    return sum(len(module._forward_hooks) for module in recipe.modules())


def test_hooks_are_set_once_and_keep_nothing_after_forward_even_one_that_fails(
    problem: Problem,
    stage1_of: Callable[..., Any],
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = stage1_of(problem)  # its default terms read modules of student and teacher
    hooks, watches = hooks_of(recipe), (recipe.watching[1], recipe.frozen.watch)
    recipe(batch, 1.0)
    assert hooks_of(recipe) == hooks
    assert [watch.io for watch in watches] == [None, None]
    monkeypatch.setattr(recipe.student.tail, "forward", lambda split: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe(batch, 1.0)
    assert hooks_of(recipe) == hooks
    assert [watch.io for watch in watches] == [None, None]


def test_a_student_in_the_place_of_the_recipes_own_is_watched_too(
    problem: Problem, stage1_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage1_of(problem).eval()
    expected = recipe(batch, 1.0).loss
    recipe.student = copy.deepcopy(recipe.student)
    hooks = hooks_of(recipe)
    assert torch.equal(recipe(batch, 1.0).loss, expected)
    assert hooks_of(recipe) == hooks


def test_rate_ramps_up_in_training_and_is_full_in_eval_mode() -> None:
    config = Stage2Config(rate_weight=0.4, rate_ramp_fraction=0.5)
    assert [rate_weight(config, p, training=True) for p in (0.0, 0.25, 0.5, 1.0)] == [
        0.0,
        0.2,
        0.4,
        0.4,
    ]
    assert rate_weight(config, 0.0, training=False) == 0.4


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [("decoders", "layer2", "student module 'decoders'"), ("decoder", "layer9", "teacher module")],
)
def test_a_loss_on_a_module_that_is_not_there_is_refused_by_name(
    student: str, teacher: str, named: str, problem: Problem, stage1_of: Callable[..., Any]
) -> None:
    terms = {"x": LossTerm(criterion="RelativeMSE", student=student, teacher=teacher)}
    with pytest.raises(ModelError, match=named):
        stage1_of(problem, losses=terms)
