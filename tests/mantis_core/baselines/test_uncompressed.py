"""Individual models and tuned teachers: what each is trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mantis_core.baselines.image_codecs import IMAGE_CODECS
from mantis_core.baselines.uncompressed import codec_teacher_recipe, individual_recipe
from mantis_core.config import CodecTeacherConfig
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.teachers.teacher import Teacher
from tests.mantis_core.recipe_checks import changed, snapshot, train, without_gradient


def test_individual_models_start_from_the_teacher_and_train_on_their_own_images(
    problem: Problem, teacher: Teacher, batch_of: Callable[..., Batch]
) -> None:
    recipe = individual_recipe(teacher, problem, seed=0)
    first = recipe.student["animals"].backbone.net.conv1.weight  # type: ignore[index]
    assert torch.equal(first, teacher.backbone.net.conv1.weight)  # type: ignore[union-attr]
    recipe.train()
    recipe(batch_of(problem, classes=(0, 1)), 0.0).loss.backward()
    assert without_gradient(recipe) == []


def test_batch_norms_of_individual_models_keep_the_teachers_statistics(
    problem: Problem, teacher: Teacher, batch_of: Callable[..., Batch]
) -> None:
    recipe = individual_recipe(teacher, problem, seed=0)
    before = {name: value.clone() for name, value in recipe.student.named_buffers()}
    weights = snapshot(recipe.student)
    train(recipe, [batch_of(problem, 4, seed=i) for i in range(2)])
    assert all(torch.equal(value, before[name]) for name, value in recipe.student.named_buffers())
    assert "animals.backbone.net.bn1.weight" in changed(recipe.student, weights)


def test_an_image_of_an_individual_model_is_computed_alike_whatever_stands_beside_it(
    problem: Problem, teacher: Teacher, batch_of: Callable[..., Batch]
) -> None:
    recipe = individual_recipe(teacher, problem, seed=0).train()
    both, one = batch_of(problem, 2, classes=(0,)), batch_of(problem, 2, classes=(0,))
    both.image[1] = both.image[0] // 2
    one.image[:] = both.image[0]
    seen: list[Tensor] = []
    recipe.student["animals"].register_forward_hook(  # type: ignore[index]
        lambda _, given, made: seen.append(made["logits/animals"][0])
    )
    for batch in (both, one):
        recipe(batch, 0.0)
    torch.testing.assert_close(seen[0], seen[1])


def test_a_tuned_teacher_sees_what_its_codec_leaves(
    problem: Problem, teacher: Teacher, batch_of: Callable[..., Batch], batch: Batch
) -> None:
    config = CodecTeacherConfig(codec="jpeg", qualities=(5, 90))
    recipe = codec_teacher_recipe(config, copy.deepcopy(teacher)).eval()
    seen: list[Tensor] = []
    recipe.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        recipe(batch, 1.0)
    codec = IMAGE_CODECS["jpeg"]
    for index, image in enumerate(batch.image.permute(0, 2, 3, 1).numpy()):
        left = codec.decode(codec.encode(image, (5, 90)[index % 2]))
        expected = normalise(torch.from_numpy(left.copy()).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(seen[0][index], expected)
    before = snapshot(recipe.student)
    train(recipe, [batch_of(problem, seed=i) for i in range(2)])
    assert "backbone.net.conv1.weight" in changed(recipe.student, before)


def test_a_tuned_teachers_eval_qualities_go_with_the_rows_and_not_with_their_places(
    problem: Problem, teacher: Teacher, batch: Batch
) -> None:
    config = CodecTeacherConfig(codec="jpeg", qualities=(5, 90))
    recipe = codec_teacher_recipe(config, copy.deepcopy(teacher)).eval()
    seen: list[Tensor] = []
    recipe.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    last = Batch(
        batch.image[3:],
        batch.class_label[3:],
        batch.labels[3:],
        batch.task_mask[3:],
        {},
        batch.row_id[3:],
    )
    with torch.no_grad():
        recipe(batch, 1.0)
        recipe(last, 1.0)
    assert torch.equal(seen[1], seen[0][3:])


def test_an_individual_model_answers_its_one_image_wherever_it_stands_in_the_batch(
    problem: Problem, teacher: Teacher, batch_of: Callable[..., Batch]
) -> None:
    recipe = individual_recipe(teacher, problem, seed=0).eval()
    others, one = batch_of(problem, 5, classes=(0,)), batch_of(problem, 1, classes=(5,))
    joined = Batch(
        *(
            torch.cat([getattr(others, key), getattr(one, key)])
            for key in ("image", "class_label", "labels", "task_mask")
        ),
        segmentation={},
        row_id=torch.arange(6),
    )
    with torch.no_grad():
        alone, together, without = (recipe(b, 1.0).loss for b in (one, joined, others))
    torch.testing.assert_close(together, alone + without, atol=1e-4, rtol=1e-4)
