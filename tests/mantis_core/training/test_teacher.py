"""The teacher: built, taken from elsewhere, trained on labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mantis_core.config import TeacherConfig, TrainingConfig
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.training.teacher import (
    check_answers,
    new_teacher,
    ready_teacher,
    teacher_recipe,
    wrong_order,
)
from tests.mantis_core.conftest import make_batch, make_problem
from tests.mantis_core.narrow_resnet import NAME, NarrowResNet
from tests.mantis_core.recipe_checks import without_gradient

TRAIN = TeacherConfig(name=NAME, weights="train")
TINY = TeacherConfig(name=NAME, training=TrainingConfig(epochs=2, batch_size=4))


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
    with pytest.raises(ModelError, match=r"no route.*or set teacher\.weights=train"):
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
    other = NarrowResNet(7).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    config = TRAIN.model_copy(update={"start": str(tmp_path / "other.safetensors")})
    teacher = teacher_recipe(config, problem, seed=0).student
    assert torch.equal(teacher.state_dict()["backbone.net.conv1.weight"], other["conv1.weight"])
    wrong = TRAIN.model_copy(update={"name": "mobilenet_v2", "split": "features.6"})
    wrong = wrong.model_copy(update={"start": config.start})
    with pytest.raises(ModelError, match="do not fit mobilenet_v2"):
        teacher_recipe(wrong, problem, seed=0)


def test_a_teacher_may_begin_with_torchvisions_weights(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    other, get_model = NarrowResNet(), torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, weights: other if weights == "DEFAULT" else get_model(name, weights=weights),
    )
    start = TRAIN.model_copy(update={"start": "pretrained"})
    teacher = teacher_recipe(start, problem, seed=0).student
    assert torch.equal(teacher.state_dict()["backbone.net.conv1.weight"], other.conv1.weight)
    assert teacher.flat_head.out_features == 6

    def unreachable(name: str, weights: str | None) -> nn.Module:
        if weights is None:
            return get_model(name, weights=None)
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    message = r"teacher\.start=pretrained: .*no route.*or leave teacher\.start out"
    with pytest.raises(ModelError, match=message):
        teacher_recipe(start, problem, seed=0)


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


def called(*answers: tuple[int, int, int], size: int = 4, right: int = 0) -> Tensor:
    """Counts by true label and answer: (label, answer, images), and `right` images of each."""
    table = right * torch.eye(size, dtype=torch.long)
    for label, answer, images in answers:
        table[label, answer] += images
    return table


NAMES = ("cat", "dog", "owl", "saw")


@pytest.mark.parametrize(
    "table",
    [
        called(right=10),
        called((0, 1, 6), right=5),  # cats are mostly dogs, but dogs are dogs
        called((0, 1, 2), (1, 0, 2)),  # too few images to say
        called(size=4),
        called((0, 0, 7), (1, 2, 9), size=3),
        called((0, 0, 20), (0, 1, 20), (1, 1, 25), (1, 0, 15), size=2),
        called((0, 0, 60), size=1),
    ],
)
def test_answers_that_are_merely_weak_or_few_are_let_pass(table: Tensor) -> None:
    assert wrong_order(table, NAMES) is None


def test_classes_that_are_taken_for_each_other_are_named() -> None:
    ring = called((1, 2, 9), (2, 3, 9), (3, 1, 9), (0, 0, 30))
    said = "takes most images of 'dog' for 'owl', 'owl' for 'saw', 'saw' for 'dog'"
    assert said in str(wrong_order(ring, NAMES))
    assert "'cat' for 'dog', 'dog' for 'cat'" in str(
        wrong_order(called((0, 1, 3), (1, 0, 3), size=2), NAMES)
    )


def test_answers_no_better_than_a_guess_are_told_in_percent() -> None:
    guessed = 5 * torch.ones(4, 4, dtype=torch.long)
    assert "right about 25.0% of the images of each class, a guess about 25.0%" in str(
        wrong_order(guessed, NAMES)
    )
    always_cats = called((0, 0, 90), (1, 0, 5), (2, 0, 3), (3, 0, 2))
    assert "25.0%" in str(wrong_order(always_cats, NAMES))


class Answers(nn.Module):
    """Stands for a teacher: reads its answer to an image from the image's first pixel."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.tensor(order).float(), requires_grad=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        label = (images[:, 0, 0, 0] - normalise(torch.zeros(1, 3, 1, 1).byte())[0, 0]) * 0.229 * 255
        said = self.order[label.round().long().flatten()].long()
        return {"logits": nn.functional.one_hot(said, 6).float()}


@pytest.mark.parametrize("single_class", [True, False])
def test_a_teacher_whose_logits_stand_in_another_order_is_refused(single_class: bool) -> None:
    problem = make_problem(single_class=single_class)
    labelled = make_batch(make_problem(), 60)
    batch = replace(
        labelled if single_class else make_batch(problem, 60),
        image=labelled.class_label.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4),
    )
    right: Any = Answers((0, 1, 2, 3, 4, 5))
    check_answers(right, problem, [batch])
    swapped: Any = Answers((1, 0, 2, 3, 4, 5))
    with pytest.raises(ModelError, match=r"'cat' for 'dog'.*teacher\.classes=sorted"):
        check_answers(swapped, problem, [batch])
