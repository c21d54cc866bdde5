"""Stage 2: what it computes from a batch, what it leaves alone, what it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mantis_core.architecture import ConditioningConfig, ModelConfig
from mantis_core.codec.checkpoint import load_model
from mantis_core.config import Stage1Config, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.folders import read_meta
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.stage1 import stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from tests.mantis_core.recipe_checks import changed, snapshot, train, without_gradient


def test_stage_2_changes_neither_stem_nor_teacher_parameters_nor_buffers(
    problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(problem)
    assert recipe.teacher is not None
    stem, teacher = snapshot(recipe.student.client.stem), snapshot(recipe.teacher)
    encoder = snapshot(recipe.student.client.encoder)
    train(recipe, [batch_of(problem, seed=i) for i in range(3)])
    assert changed(recipe.student.client.stem, stem) == []
    assert changed(recipe.teacher, teacher) == []
    assert changed(recipe.student.client.encoder, encoder)


def test_stage_2_keeps_the_teachers_batch_norm_statistics_in_the_trunk(
    problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(problem)
    trunk = recipe.student.server.trunk
    before = {name: value.clone() for name, value in trunk.named_buffers()}
    train(recipe, [batch_of(problem, seed=i) for i in range(2)])
    assert all(torch.equal(value, before[name]) for name, value in trunk.named_buffers())


def test_a_worker_without_rows_takes_part_in_calibrating(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage2_of(problem)
    gathered: list[Tensor] = []

    def gather(rows: Tensor) -> Tensor:
        gathered.append(rows)
        return torch.rand(5, 3) if rows.is_floating_point() else torch.ones(5, 3, dtype=torch.bool)

    recipe.calibrate(recipe.student, [], gather)
    assert [(tuple(rows.shape), rows.dtype) for rows in gathered] == [
        ((0, 3), torch.float32),
        ((0, 3), torch.bool),
    ]
    assert float(recipe.student.mask_threshold) < 0.5


def test_images_of_no_task_train_the_detector_and_give_a_finite_loss(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    nothing = replace(
        batch,
        class_label=torch.full_like(batch.class_label, -1),
        labels=torch.full_like(batch.labels, -1),
        task_mask=torch.zeros_like(batch.task_mask),
    )
    recipe = stage2_of(problem).train()
    output = recipe(nothing, 0.0)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert recipe.student.client.detector.mlp[-1].bias.grad.abs().sum() > 0


def test_the_loss_is_its_terms_and_the_weighted_bits(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage2_of(problem, rate_weight=0.01).eval()
    output = recipe(batch, 1.0)
    terms = sum(value for name, value in output.sums.items() if name.startswith("loss/"))
    expected = (terms + 0.01 * output.sums["bits"]) / len(batch)
    torch.testing.assert_close(output.loss, expected)


def condition(recipe: Any, batch: Batch, progress: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    detected = torch.rand(len(batch), 3)
    mask = recipe.student.select_mask(detected)
    return (detected, *recipe.asking(detected, mask, batch, progress)[:3])


def test_forced_images_are_conditioned_on_non_empty_subsets_of_the_truth(
    problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(problem, teacher_forcing=(1.0, 0.0), subset_fraction=0.5).train()
    batch = batch_of(problem, 64, classes=(4, 0))
    _, encoder_reads, mask, counted = condition(recipe, batch, 0.0)
    assert torch.equal(encoder_reads, mask.float())
    assert torch.equal(counted, mask)
    assert (mask <= batch.task_mask).all()
    assert mask.any(dim=1).all()
    assert (mask != batch.task_mask).any()
    whole = (mask == batch.task_mask).all(dim=1) & (batch.task_mask.sum(dim=1) == 2)
    assert whole.any()


def test_subsets_of_every_size_are_equally_likely(
    problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(problem, teacher_forcing=(1.0, 0.0), subset_fraction=1.0).train()
    rows = 3000
    batch = replace(
        batch_of(problem, 1),
        image=torch.zeros(rows, 3, 1, 1, dtype=torch.uint8),
        task_mask=torch.tensor([True, True, True]).repeat(rows, 1),
    )
    torch.manual_seed(0)
    _, _, mask, _ = condition(recipe, batch, 0.0)
    sizes = mask.sum(dim=1).bincount(minlength=4) / rows
    torch.testing.assert_close(sizes, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), rtol=0, atol=0.04)
    alone = mask[mask.sum(dim=1) == 1].float().mean(dim=0)
    torch.testing.assert_close(alone, torch.full((3,), 1 / 3), rtol=0, atol=0.06)


def test_unforced_images_and_eval_mode_follow_the_detector(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage2_of(problem, teacher_forcing=(1.0, 0.0))
    for progress, mode in ((1.0, True), (0.0, False)):
        recipe.train(mode)
        detected, encoder_reads, mask, counted = condition(recipe, batch, progress)
        assert torch.equal(encoder_reads, detected)
        assert torch.equal(mask, recipe.student.select_mask(detected))
        assert torch.equal(counted, batch.task_mask)


def test_stage_2_starts_from_stage_1_and_the_teacher(
    problem: Problem, stage1_of: Callable[..., Any], stage2_of: Callable[..., Any]
) -> None:
    first, second = stage1_of(problem), stage2_of(problem)
    shipped, codec = first.student.shipped(), second.student.state_dict()
    assert not any(name.startswith("tail.") for name in shipped)
    for name in ("client.stem.0.weight", "client.encoder.to_latent.weight"):
        assert torch.equal(codec[name], shipped[name])
    assert torch.equal(codec["server.decoder.last.weight"], shipped["decoder.last.weight"])
    rows = codec["bottleneck.density.matrices.0"].split(4)  # the latent's channels
    assert len(rows) == 3
    assert all(torch.equal(row, shipped["bottleneck.density.matrices.0"]) for row in rows)
    tail = second.student.server.tails["kitchen"].linear
    assert torch.equal(tail.weight[:-1], second.teacher.flat_head.weight[[4, 5]])
    assert float(tail.weight[-1].detach().abs().sum()) == 0


def test_a_segmentation_tail_starts_as_the_teachers_head(
    mixed_problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    recipe = stage2_of(mixed_problem)
    ours = recipe.student.server.tails["ground"].state_dict()
    theirs = recipe.teacher.heads["ground"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_at_init_stage_2_codes_as_stage_1_does(
    problem: Problem, stage1_of: Callable[..., Any], stage2_of: Callable[..., Any]
) -> None:
    first, second = stage1_of(problem).student.eval(), stage2_of(problem).student.eval()
    images = torch.randn(2, 3, 32, 32)
    expected, found = (
        each.client.encode(view, torch.sigmoid(view.logits))
        for each in (first, second)
        for view in [each.client(images)]
    )
    torch.testing.assert_close(found, expected)


def test_without_conditioning_stage_2_trains_too(
    problem: Problem,
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
    batch: Batch,
) -> None:
    none = small_config(conditioning=ConditioningConfig(kind="none", hidden=8))
    recipe = stage2_of(problem, none).train()
    recipe(batch, 0.5).loss.backward()
    assert without_gradient(recipe) == []


def test_stage_2_calibrates_the_threshold_to_the_configured_coverage(
    problem: Problem,
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    recipe = stage2_of(problem, small_config(coverage=0.8))
    student = recipe.student
    holdout = [batch_of(problem, 16, seed=i) for i in range(2)]
    recipe.calibrate(student, holdout, lambda rows: rows)
    hits = asked = 0
    for batch in holdout:
        encoded = student.client.eval()(normalise(batch.image)).logits.sigmoid()
        hits += int((student.select_mask(encoded) & batch.task_mask).sum())
        asked += int(batch.task_mask.sum())
    assert hits >= math.ceil(0.8 * asked)
    assert 0 < float(student.mask_threshold) <= 0.5


def test_an_image_alone_and_in_a_batch_gives_the_same_eval_figures(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage2_of(problem).eval()
    with torch.no_grad():
        whole = recipe(batch, 1.0)
        parts = []
        for i in range(len(batch)):
            one = slice(i, i + 1)
            parts.append(
                recipe(
                    Batch(
                        batch.image[one],
                        batch.class_label[one],
                        batch.labels[one],
                        batch.task_mask[one],
                        {},
                        batch.row_id[one],
                    ),
                    1.0,
                )
            )
    bits = sum(float(part.sums["bits"]) for part in parts)
    assert bits == pytest.approx(float(whole.sums["bits"]), rel=0.02)
    hits = sum(int(part.sums["detection/exact"]) for part in parts)
    assert hits == int(whole.sums["detection/exact"])


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


def test_stem_and_detector_run_once_in_a_step(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe, ran = stage2_of(problem).train(), []
    client = recipe.student.client
    for name in ("stem", "detector", "encoder"):
        module = getattr(client, name)
        module.register_forward_hook(lambda _module, _given, _made, name=name: ran.append(name))
    recipe(batch, 0.0)
    assert ran == ["stem", "detector", "encoder"]


def test_a_codec_saved_by_its_recipe_is_loaded_finished(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch, tmp_path: Path
) -> None:
    recipe = stage2_of(problem)
    codec = recipe.student.eval()
    recipe.save(codec, tmp_path, "stage2", {"stage": "stage2"})
    assert read_meta(tmp_path)["stage"] == "stage2"
    assert load_model(tmp_path).encode(batch.image) == codec.encode(batch.image)
