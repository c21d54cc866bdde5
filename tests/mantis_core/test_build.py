"""From config sections to teachers and recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mantis_core.build import (
    Problem,
    individual_recipe,
    model_spec,
    new_teacher,
    ready_teacher,
    stage1_recipe,
    teacher_recipe,
)
from mantis_core.config import IndividualConfig, ModelConfig, Stage1Config, TeacherConfig
from mantis_core.errors import ModelError
from mantis_core.teacher import Teacher

TRAIN = TeacherConfig(name="resnet18", weights="train")


def test_a_teacher_has_one_flat_head_where_each_image_has_one_class(
    problem: Problem, mixed_problem: Problem
) -> None:
    flat, by_task = new_teacher(TRAIN, problem), new_teacher(TRAIN, mixed_problem)
    assert flat.flat_head.out_features == 6
    assert list(flat.heads) == []
    assert list(by_task.heads) == ["animals", "tools", "kitchen", "ground"]


def test_a_trained_teacher_is_taken_whole(problem: Problem) -> None:
    torch.manual_seed(3)
    trained = new_teacher(TRAIN, problem).state_dict()
    teacher = ready_teacher(TRAIN, problem, trained)
    assert all(torch.equal(v, trained[k]) for k, v in teacher.state_dict().items())


def test_a_teacher_from_a_file_knows_the_tasks(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.safetensors"
    save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    config = TeacherConfig(name="resnet18", weights=str(path))
    known = replace(problem, imagenet_indices=(1, 2, 3, 4, 5, 6))
    teacher = ready_teacher(config, known, None)
    assert teacher.tasks == problem.tasks
    assert teacher.flat_head.out_features == 6
    with pytest.raises(ModelError, match="1000 logits, the data has 6"):
        ready_teacher(config, problem, None)


def test_without_network_a_pretrained_teacher_says_what_to_do_instead(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, weights: str | None) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(ModelError, match=r"no route.*give a local file, or teacher\.weights=train"):
        ready_teacher(TeacherConfig(name="resnet18"), problem, None)


def test_the_same_seed_builds_the_same_weights(problem: Problem) -> None:
    first, again, other = (
        teacher_recipe(TRAIN, problem, seed=seed).student.state_dict() for seed in (0, 0, 1)
    )
    name = "backbone.net.conv1.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_the_spec_of_a_codec_fits_the_teachers_features(
    problem: Problem, teacher: Teacher, small_config: Callable[..., ModelConfig]
) -> None:
    spec = model_spec(small_config(), teacher, problem)
    assert (spec.split_shape, spec.last_shape) == ((128, 4, 4), (512, 1, 1))
    assert (spec.teacher, spec.split, spec.classes) == ("resnet18", "layer2", problem.classes)


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


def test_individual_models_may_have_another_backbone(problem: Problem, teacher: Teacher) -> None:
    recipe = individual_recipe(IndividualConfig(backbone="mobilenet_v2"), teacher, problem, seed=0)
    assert list(recipe.student.children())[0].name == "mobilenet_v2"  # noqa: RUF015
