"""From config sections to teachers and recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mantis_core.build import (
    Problem,
    model_spec,
    new_teacher,
    ready_teacher,
    stage1_recipe,
    stage2_recipe,
    teacher_recipe,
)
from mantis_core.config import (
    ConditioningConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
)
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


def test_one_task_of_all_classes_is_trained_from_the_same_stage1_and_codes_the_class(
    problem: Problem,
    mixed_problem: Problem,
    teacher: Teacher,
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Any],
) -> None:
    teacher.tasks = problem.tasks
    first = stage1_recipe(Stage1Config(), small_config(), teacher, problem, seed=0)
    config = small_config(
        conditioning=ConditioningConfig(kind="none"), prior="shared", single_task=True
    )
    shipped = first.student.shipped()
    recipe = stage2_recipe(Stage2Config(), config, teacher, problem, shipped, seed=0)
    codec, batch = recipe.student, batch_of(problem)
    assert codec.spec.task_names == ("all",)
    stem = "client.stem.0.weight"
    assert torch.equal(codec.state_dict()[stem], shipped[stem])
    assert torch.isfinite(recipe.train()(batch, 0.5).loss)
    recipe.calibrate(codec, [batch], lambda part: part)
    codec.finish()
    for answer in codec.decode(codec.encode(batch.image)):
        assert answer.tasks == ("all",)
        assert answer.class_name == problem.class_names[answer.class_index]
    with pytest.raises(ModelError, match="leave out the baseline `student`"):
        stage2_recipe(Stage2Config(), config, teacher, mixed_problem, shipped, seed=0)


def test_a_teacher_may_begin_with_the_body_of_other_weights(
    problem: Problem, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    other = torchvision.models.resnet18(num_classes=7).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    config = TRAIN.model_copy(update={"start": str(tmp_path / "other.safetensors")})
    teacher = teacher_recipe(config, problem, seed=0).student
    assert torch.equal(teacher.state_dict()["backbone.net.conv1.weight"], other["conv1.weight"])
    wrong = TRAIN.model_copy(update={"name": "mobilenet_v2", "split": "features.6"})
    wrong = wrong.model_copy(update={"start": config.start})
    with pytest.raises(ModelError, match="do not fit mobilenet_v2"):
        teacher_recipe(wrong, problem, seed=0)
