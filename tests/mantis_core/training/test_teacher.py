"""The teacher: built, taken from elsewhere, trained on labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mantis_core.config import TeacherConfig, TrainingConfig
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder
from mantis_core.tasks import Batch, Problem
from mantis_core.training.teacher import new_teacher, ready_teacher, teacher_recipe
from tests.mantis_core.recipe_checks import without_gradient

TRAIN = TeacherConfig(name="resnet18", weights="train")
TINY = TeacherConfig(name="resnet18", training=TrainingConfig(epochs=2, batch_size=4))


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


def test_a_teacher_from_a_file_has_features_alone_for_segmentations_alone(
    mixed_problem: Problem, tmp_path: Path
) -> None:
    path = tmp_path / "resnet18.safetensors"
    state = torchvision.models.resnet18(weights=None).state_dict()
    save_file(state, path)
    alone = replace(
        mixed_problem,
        tasks=mixed_problem.tasks[-1:],
        classes=(),
        class_names=(),
        imagenet_indices=(),
    )
    teacher = ready_teacher(TeacherConfig(name="resnet18", weights=str(path)), alone, None)
    assert teacher.tasks == alone.tasks
    assert torch.equal(teacher.backbone.net.get_parameter("conv1.weight"), state["conv1.weight"])
    assert teacher.eval()(torch.zeros(1, 3, 32, 32)).keys() == {"split", "last"}


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


def test_a_teacher_is_trained_on_labels_flat_and_head_by_head(
    problem: Problem, mixed_problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    for each in (problem, mixed_problem):
        recipe = teacher_recipe(TINY, each, seed=0).train()
        output = recipe(batch_of(each), 0.0)
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert without_gradient(recipe) == []


def test_a_trained_teacher_is_saved_under_the_name_of_its_training(
    problem: Problem, tmp_path: Path
) -> None:
    recipe = teacher_recipe(TRAIN, problem, seed=0)
    recipe.save(recipe.student, tmp_path, "teacher", {})
    tensors, config, _ = load_folder(tmp_path)
    assert config == {"kind": "teacher"}
    again = ready_teacher(TRAIN, problem, tensors).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in recipe.student.state_dict().items())
