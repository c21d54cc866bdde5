"""Stage 1: what it computes from a batch, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.architecture import ModelConfig
from mantis_core.config import LossTerm, Stage1Config
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder
from mantis_core.tasks import Batch, Problem
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.stage1 import stage1_recipe
from tests.mantis_core.recipe_checks import changed, snapshot, train, without_gradient


def test_stage_1_changes_neither_the_tail_nor_the_teacher(
    problem: Problem, stage1_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage1_of(problem)
    tail, teacher = snapshot(recipe.student.tail), snapshot(recipe.teacher)
    stem = snapshot(recipe.student.client.stem)
    train(recipe, [batch_of(problem, seed=i) for i in range(2)])
    assert changed(recipe.student.tail, tail) == []
    assert changed(recipe.teacher, teacher) == []
    assert changed(recipe.student.client.stem, stem)


@pytest.mark.parametrize("losses", [None, {"logits": LossTerm(criterion="TeacherLogits")}])
def test_every_parameter_has_a_gradient_in_stage_1_with_or_without_a_detection_term(
    losses: dict[str, LossTerm] | None,
    problem: Problem,
    stage1_of: Callable[..., Any],
    batch: Batch,
) -> None:
    recipe = stage1_of(problem, **({} if losses is None else {"losses": losses})).train()
    recipe(batch, 0.5).loss.backward()
    assert without_gradient(recipe) == []


@pytest.mark.parametrize(
    "term",
    [
        LossTerm(criterion="TaskDetection"),
        LossTerm(criterion="MSELoss", student="client.stem", teacher="layer1"),
    ],
)
def test_a_stage_1_that_would_not_train_its_decoder_is_refused(
    term: LossTerm, problem: Problem, stage1_of: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=r"none of x trains the decoder: keep TeacherLogits"):
        stage1_of(problem, losses={"x": term})


def test_class_detection_asks_for_a_detector_of_classes(
    problem: Problem, stage1_of: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=r"losses\.x: ClassDetection .* model\.detector\.classes"):
        stage1_of(problem, losses={"x": LossTerm(criterion="ClassDetection")})


@pytest.mark.parametrize("split", ["layer1", "layer3"])
def test_a_codec_may_be_cut_at_a_split_of_another_resolution(
    split: str,
    problem: Problem,
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., object],
) -> None:
    torch.manual_seed(0)
    teacher = Teacher("resnet18", split=split, flat_classes=6, image_size=(32, 32))
    teacher.tasks = problem.tasks
    recipe = stage1_recipe(Stage1Config(), small_config(), teacher, problem, seed=0)
    assert torch.isfinite(recipe.train()(batch_of(problem), 0.5).loss)


def test_what_is_saved_is_what_stage_2_starts_from(
    problem: Problem, stage1_of: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = stage1_of(problem)
    recipe.save(recipe.student, tmp_path, "stage1", {})
    tensors, config, _ = load_folder(tmp_path)
    assert tensors.keys() == recipe.student.shipped().keys()
    assert not any(name.startswith("tail.") for name in tensors)
    assert config == {"kind": "stage1"}
