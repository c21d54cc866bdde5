"""Stage 2: which parameters it trains, at which rate, and that a loss term reaches each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from mantis_core.architecture import ConditioningConfig, ModelConfig
from mantis_core.config import LossTerm, Stage1Config, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.tasks import Batch, Problem
from mantis_core.training.loop import Session
from mantis_core.training.optim import parameter_groups
from mantis_core.training.stage1 import stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from tests.mantis_core.conftest import make_problem, make_teacher
from tests.mantis_core.recipe_checks import without_gradient


def groups_of(recipe: Any) -> dict[str, set[str]]:
    """The parts of the student by how their parameters are trained."""
    groups = parameter_groups(recipe.student, loaded=recipe.loaded)
    found = {
        name: {".".join(own.split(".")[:2]) for own in group} for name, group in groups.items()
    }
    return {
        "fine_tuned": found["fine_tuned"] | found["fine_tuned_no_decay"],
        "new": found["new"] | found["new_no_decay"],
    }


def test_all_that_was_trained_before_learns_at_the_fine_tuning_rate(
    problem: Problem, mixed_problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    trained = {"client.encoder", "client.detector", "server.decoder", "server.trunk"}
    fresh = {"client.conditioning", "server.task_decoders"}
    for known in (problem, mixed_problem):  # of a flat teacher, and of one with heads
        groups = groups_of(stage2_of(known))
        assert groups == {"fine_tuned": {*trained, "server.tails"}, "new": fresh}


def test_a_stem_that_is_not_frozen_is_fine_tuned(
    problem: Problem, stage2_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage2_of(problem, freeze_stem=False).train()
    assert "client.stem" in groups_of(recipe)["fine_tuned"]
    assert recipe.student.client.stem.training
    recipe(batch_of(problem), 0.5).loss.backward()
    assert without_gradient(recipe) == []


@pytest.mark.parametrize("own", [None, "noise", "rounded", "jitter", "soft"])
def test_a_training_may_have_a_quantizer_of_its_own(
    problem: Problem, stage1_of: Callable[..., Any], stage2_of: Callable[..., Any], own: Any
) -> None:
    for make in (stage1_of, stage2_of):
        assert make(problem, quantizer=own).student.bottleneck.quantizer == (own or "ste")


def test_what_stage_1_or_the_teacher_lacks_learns_at_the_rate_of_new_parameters(
    problem: Problem, stage1_of: Callable[..., Any], small_config: Callable[..., ModelConfig]
) -> None:
    losses = {"logits": LossTerm(criterion="TeacherLogits")}  # nothing trains the detector
    first = stage1_of(problem, losses=losses)
    stage1 = Session(first, first.config, steps_per_epoch=1, seed=0).recipe.student.shipped()
    own = (Stage2Config(), small_config(), first.teacher, problem)
    assert "client.detector" in groups_of(stage2_recipe(*own, stage1, seed=0))["new"]
    first.teacher.flat_classes = 0  # a teacher without heads
    assert "server.tails" in groups_of(stage2_recipe(*own, stage1, seed=0))["new"]


def test_the_last_layer_of_a_detector_of_other_tasks_is_new(
    problem: Problem, stage2_of: Callable[..., Any], small_config: Callable[..., ModelConfig]
) -> None:
    recipe = stage2_of(problem, small_config(single_task=True))
    groups = parameter_groups(recipe.student, loaded=recipe.loaded)
    new = {name for name in groups["new"] if name.startswith("client.detector.")}
    assert new == {"client.detector.mlp.2.weight"}


def test_the_averaged_student_of_stage_1_ships_its_trained_detector(
    problem: Problem, stage1_of: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    recipe = stage1_of(problem, ema_decay=0.9, epochs=1)
    session = Session(recipe, recipe.config, steps_per_epoch=1, seed=0)
    session.train_epoch([batch_of(problem)])
    session.evaluate(lambda: [batch_of(problem, seed=1)])
    shipped = session.best_student().shipped()  # type: ignore[operator]
    assert any(name.startswith("client.detector.") for name in shipped)


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


TERMS = ("TaskDetection", "TaskLosses", "JointDecision", "TeacherDecision")


@pytest.mark.parametrize("kind", ["film", "features"])
@pytest.mark.parametrize(("single_class", "flat"), [(True, True), (False, False), (False, True)])
def test_every_combination_of_terms_reaches_all_that_is_trained_or_is_refused(
    kind: str,
    single_class: bool,
    flat: bool,
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    problem = make_problem(single_class=single_class)
    model = small_config(conditioning=ConditioningConfig(kind=kind, hidden=8))  # type: ignore[arg-type]
    teacher = make_teacher(make_problem(single_class=flat))
    teacher.tasks = problem.tasks
    stage1 = stage1_recipe(Stage1Config(), model, teacher, problem, seed=0).student.shipped()
    refused: dict[tuple[str, ...], str] = {}
    for chosen in product((False, True), repeat=len(TERMS)):
        names = tuple(name for name, used in zip(TERMS, chosen, strict=True) if used)
        if not names:
            continue
        config = Stage2Config(losses={name: LossTerm(criterion=name) for name in names})
        try:
            recipe = stage2_recipe(config, model, teacher, problem, stage1, seed=0).train()
        except ModelError as error:
            refused[names] = str(error)
            continue
        recipe(batch_of(problem, 4), 0.5).loss.backward()
        assert without_gradient(recipe) == [], names
    assert ("TaskDetection",) in refused
    assert all("add a term with criterion TaskLosses" in told for told in refused.values())
    assert not any("TaskLosses" in names for names in refused)
    taught = ("TeacherDecision",) in refused
    assert taught == (flat and not single_class)  # a flat teacher knows nothing of the segmentation


def test_a_detector_that_no_term_reaches_is_frozen(
    mixed_problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    losses = {"tasks": LossTerm(criterion="TaskLosses")}
    client = stage2_of(mixed_problem, losses=losses).student.client
    assert not any(p.requires_grad for p in client.detector.parameters())
    assert all(p.requires_grad for p in client.encoder.parameters())


def test_a_task_that_the_teacher_does_not_know_is_warned_of(
    mixed_problem: Problem,
    small_config: Callable[..., ModelConfig],
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = make_teacher(make_problem())
    teacher.tasks = mixed_problem.tasks
    shipped = stage1_recipe(Stage1Config(), small_config(), teacher, mixed_problem, seed=0)
    stage2_recipe(
        Stage2Config(),
        small_config(),
        teacher,
        mixed_problem,
        shipped.student.shipped(),  # type: ignore[operator]
        seed=0,
    )
    assert "TeacherDecision has no effect on ground: the teacher has no head for it" in caplog.text
