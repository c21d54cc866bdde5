"""What each stage computes from a batch, what it leaves alone, what it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mantis_core.build import Problem
from mantis_core.config import (
    ConditioningConfig,
    DetectorConfig,
    LossTerm,
    ModelConfig,
    Stage2Config,
)
from mantis_core.errors import ModelError
from mantis_core.hits import label_hits
from mantis_core.preprocessing import normalise
from mantis_core.recipes import rate_weight
from mantis_core.tasks import Batch
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


@pytest.mark.parametrize("stage", ["stage1_of", "stage2_of"])
def test_the_teacher_stays_in_eval_mode(
    stage: str, problem: Problem, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(stage)(problem)
    recipe.train()
    assert recipe.training
    assert recipe.student.training
    assert not any(module.training for module in recipe.teacher.modules())


@pytest.mark.parametrize("prior", ["shared", "per_task", "primary"])
def test_every_parameter_has_a_gradient_in_stage_2_though_tasks_are_absent(
    prior: str,
    problem: Problem,
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    recipe = stage2_of(problem, small_config(prior=prior)).train()
    output = recipe(batch_of(problem, classes=(0, 1, 2)), 0.5)  # animals alone
    output.loss.backward()
    assert without_gradient(recipe) == []


def test_every_parameter_has_a_gradient_with_segmentation_too(
    mixed_problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(mixed_problem).train()
    batch = batch_of(mixed_problem, classes=(0, 1, 2))
    batch.task_mask[:, -1] = False
    recipe(batch, 0.5).loss.backward()
    assert without_gradient(recipe) == []


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


def test_class_detection_asks_for_a_detector_of_classes(
    problem: Problem, stage1_of: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=r"losses\.x: ClassDetection .* model\.detector\.classes"):
        stage1_of(problem, losses={"x": LossTerm(criterion="ClassDetection")})


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


def test_hooks_are_removed_after_forward_even_one_that_fails(
    problem: Problem,
    stage1_of: Callable[..., Any],
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = stage1_of(problem)  # its default terms read modules of student and teacher
    recipe(batch, 1.0)
    assert not any(module._forward_hooks for module in recipe.modules())
    monkeypatch.setattr(recipe.student.tail, "forward", lambda split: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe(batch, 1.0)
    assert not any(module._forward_hooks for module in recipe.modules())


def test_the_loss_is_its_terms_and_the_weighted_bits(
    problem: Problem, stage2_of: Callable[..., Any], batch: Batch
) -> None:
    recipe = stage2_of(problem, rate_weight=0.01).eval()
    output = recipe(batch, 1.0)
    terms = sum(value for name, value in output.sums.items() if name.startswith("loss/"))
    expected = (terms + 0.01 * output.sums["bits"]) / len(batch)
    torch.testing.assert_close(output.loss, expected)


def test_rate_ramps_up_in_training_and_is_full_in_eval_mode() -> None:
    config = Stage2Config(rate_weight=0.4, rate_ramp_fraction=0.5)
    assert [rate_weight(config, p, training=True) for p in (0.0, 0.25, 0.5, 1.0)] == [
        0.0,
        0.2,
        0.4,
        0.4,
    ]
    assert rate_weight(config, 0.0, training=False) == 0.4


def condition(recipe: Any, batch: Batch, progress: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    detected = torch.rand(len(batch), 3)
    return (detected, *recipe._condition(detected, batch, progress))


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


def test_hits_count_right_answers_and_questions(problem: Problem, batch: Batch) -> None:
    truth = {
        f"logits/{t.name}": nn.functional.one_hot(batch.labels[:, k].clamp_min(0), 3).float()
        for k, t in enumerate(problem.tasks)
    }
    sums = label_hits(truth, problem.tasks, batch)
    assert int(sums["top1/hits"]) == int(sums["top1/asked"]) == int(batch.task_mask.sum())
    flat = nn.functional.one_hot((batch.class_label + 1) % 6, 6).float()
    assert int(label_hits({"logits": flat}, problem.tasks, batch)["top1/hits"]) == 0


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
