"""The baseline of a codec a task: each learns from its own images and codes them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mantis_core.architecture import DetectorConfig, ModelConfig
from mantis_core.baselines.per_task import PerTaskRecipe, load_codecs, per_task_recipe, save_codecs
from mantis_core.codec.mantis import Mantis
from mantis_core.config import LossTerm, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.teachers.teacher import Teacher, narrowed
from mantis_core.training.loop import Session
from mantis_core.training.optim import parameter_groups
from pipelines.evaluation.answers import run_per_task
from tests.mantis_core.conftest import QUICK, make_batch, make_config, make_problem, make_stage1
from tests.mantis_core.recipe_checks import train, without_gradient


def make_recipe(problem: Problem, model: ModelConfig | None = None, **changes: Any) -> Any:
    first = make_stage1(problem, model)
    recipe = per_task_recipe(
        Stage2Config(**{**QUICK, **changes}),
        (model or make_config()).model_copy(update={"per_task": True}),
        first.teacher,
        problem,
        first.student.shipped(),
        seed=0,
    )
    assert isinstance(recipe, PerTaskRecipe)
    return recipe


@pytest.mark.parametrize("single_class", [True, False])
def test_every_task_has_a_codec_of_its_own_labels(single_class: bool) -> None:
    problem = make_problem(single_class=single_class)
    codecs = make_recipe(problem).student
    assert list(codecs) == [task.name for task in problem.tasks]
    kitchen = codecs["kitchen"].spec
    assert kitchen.task_names == ("kitchen",)
    assert kitchen.classes == ("c4", "c5")
    assert kitchen.class_names == ("knife", "spoon")
    assert kitchen.single_class


@pytest.mark.parametrize("single_class", [True, False])
def test_all_of_it_is_trained_but_stems_and_detectors(single_class: bool) -> None:
    problem = make_problem(single_class=single_class)
    recipe = make_recipe(problem).train()
    recipe(make_batch(problem), 0.5).loss.backward()
    assert without_gradient(recipe) == []
    frozen = parameter_groups(recipe.student, loaded=recipe.loaded)["frozen"]
    assert {name.split(".")[2] for name in frozen} == {"stem", "detector"}
    density = parameter_groups(recipe.student, loaded=recipe.loaded)["density"]
    assert {name.split(".")[0] for name in density} == {task.name for task in problem.tasks}
    fine = parameter_groups(recipe.student, loaded=recipe.loaded)["fine_tuned"]
    assert {".".join(name.split(".")[1:3]) for name in fine} == {
        "client.encoder",
        "server.decoder",
        "server.tails",
        "server.trunk",
    }


def test_a_codec_learns_from_its_own_images_only(problem: Problem) -> None:
    recipe = make_recipe(problem).train()
    animals = make_batch(problem, classes=(0, 1, 2))
    output = recipe(animals, 0.5)
    output.loss.backward()
    moved = {
        name: sum(float(p.grad.abs().sum()) for p in codec.parameters() if p.grad is not None)
        for name, codec in recipe.student.items()
    }
    assert moved["animals"] > 0
    assert moved["tools"] == moved["kitchen"] == 0
    alone = recipe.parts["animals"].eval()
    recipe.eval()
    together = recipe(animals, 1.0)
    by_itself = alone(_only(animals, 0), 1.0)
    torch.testing.assert_close(together.loss, by_itself.loss)
    torch.testing.assert_close(together.sums["bits"], by_itself.sums["bits"])
    assert together.sums["top1/asked"] == len(animals)
    assert not any(name.startswith("detection/") for name in together.sums)


def test_an_image_of_two_tasks_counts_for_both(problem: Problem) -> None:
    recipe = make_recipe(problem).eval()
    knives = make_batch(problem, 4, classes=(4,))
    bits = [
        recipe.parts[name](_only(knives, k), 1.0).sums["bits"]
        for k, name in ((1, "tools"), (2, "kitchen"))
    ]
    output = recipe(knives, 1.0)
    torch.testing.assert_close(output.sums["bits"], bits[0] + bits[1])
    assert output.sums["top1/asked"] == 8


def _only(batch: Batch, k: int) -> Batch:
    return replace(
        batch,
        class_label=batch.labels[:, k],
        labels=batch.labels[:, k : k + 1],
        task_mask=batch.task_mask[:, k : k + 1],
    )


def test_what_is_best_so_far_is_shipped_saved_and_loaded(problem: Problem, tmp_path: Path) -> None:
    recipe = make_recipe(problem)
    batches = [make_batch(problem, seed=i) for i in range(2)]
    session = Session(recipe, recipe.parts["tools"].config, steps_per_epoch=2, seed=0)
    session.train_epoch(batches)
    assert session.evaluate(lambda: iter(batches))["holdout/bits"] > 0
    session.train_epoch(batches)  # the average was evaluated; the student goes on
    codecs = session.best_student()
    codecs.finish()
    save_codecs(tmp_path / "codecs", codecs, {})
    loaded = load_codecs(tmp_path / "codecs")
    images = batches[0].image
    for name, codec in codecs.items():
        streams = codec.encode(images)
        assert loaded[name].encode(images) == streams
        assert [a.labels for a in loaded[name].decode(streams)] == [
            a.labels for a in codec.decode(streams)
        ]


def test_another_folder_is_no_codecs(codec: Mantis, tmp_path: Path) -> None:
    from mantis_core.codec.checkpoint import save_model

    save_model(tmp_path / "model", codec, {})
    with pytest.raises(ModelError, match="holds no codecs of one task each"):
        load_codecs(tmp_path / "model")


def test_a_detector_that_names_classes_is_left_out_with_its_losses(problem: Problem) -> None:
    model = make_config(detector=DetectorConfig(channels=8, blocks=0, hidden=8, classes=True))
    losses = {**Stage2Config().losses, "classes": LossTerm(criterion="ClassDetection")}
    recipe = make_recipe(problem, model, losses=losses)
    train(recipe, [make_batch(problem)])
    assert {term.criterion for term in recipe.parts["tools"].losses.values()}.isdisjoint(
        {"ClassDetection", "TaskDetection"}
    )
    with pytest.raises(ModelError, match="a term that is no detection"):
        make_recipe(problem, model, losses={"classes": LossTerm(criterion="ClassDetection")})


@pytest.mark.parametrize("single_class", [True, False])
def test_a_narrowed_teacher_says_of_its_task_what_the_whole_one_does(
    single_class: bool, batch_of: Callable[..., Batch]
) -> None:
    problem = make_problem(single_class=single_class)
    whole = make_stage1(problem).teacher
    assert isinstance(whole, Teacher)
    images = normalise(batch_of(problem).image)
    with torch.no_grad():
        everything = whole(images)
        for task in problem.tasks:
            own = narrowed(whole, task)(images)
            if not task.is_classification:
                key = f"logits/{task.name}"
                assert torch.equal(own[key], everything[key])
            elif single_class:
                torch.testing.assert_close(own["logits"], everything["logits"][:, task.classes])
            else:
                torch.testing.assert_close(own["logits"], everything[f"logits/{task.name}"])


def test_codecs_are_saved_by_their_recipe_and_by_versions_with_summaries(
    problem: Problem, tmp_path: Path
) -> None:
    recipe = make_recipe(problem)
    codecs = recipe.student.eval()
    recipe.save(codecs, tmp_path, "stage2", {})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["kind"] == "per_task"
    for channels in (0, 8):
        for spec in config["codecs"].values():
            spec["model"]["encoder"] |= {"summary_channels": channels, "summary_hidden": 256}
            spec["model"]["decoder"] |= {"summary_hidden": 256}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        if channels:
            with pytest.raises(ModelError, match="this model sends a summary"):
                load_codecs(tmp_path)
        else:
            images = make_batch(problem).image
            again = load_codecs(tmp_path)["tools"].encode(images)  # type: ignore[operator]
            assert again == codecs["tools"].encode(images)


@pytest.mark.parametrize("requests", ["both", "asked"])
def test_codecs_of_several_rates_are_measured_at_each(requests: Any) -> None:
    problem = make_problem(single_class=False)
    recipe = make_recipe(
        problem, make_config(requests=requests, prior="shared"), rate_weights=(1e-3, 1e-1)
    )
    assert recipe.held_levels == [0, 4]
    train(recipe, [make_batch(problem, seed=seed) for seed in range(2)])
    batch, codecs = make_batch(problem), recipe.student
    recipe.eval()
    recipe.level = 4
    recipe(batch, 1.0)
    assert {part.level for _, part in recipe.parts.items()} == {4}
    with torch.no_grad():
        for _, codec in codecs.items():
            codec.client.by_level.values[0, -8:-4] = 30.0  # the latent is that much larger
    codecs.finish()
    arrays = {
        "task_mask": batch.task_mask.numpy(),
        **{f"segmentation/{name}": mask.numpy() for name, mask in batch.segmentation.items()},
    }
    sizes = [
        run_per_task(codecs, batch.image, arrays, problem, level=level)["payload_bytes"].sum()
        for level in recipe.held_levels
    ]
    assert sizes[0] > sizes[1]


def test_codecs_that_are_asked_have_exit_heads_where_there_are_labels() -> None:
    problem = make_problem(single_class=False)
    model = make_config(requests="asked", exit_heads=True)
    losses = {
        "tasks": LossTerm(criterion="TaskLosses"),
        "exits": LossTerm(criterion="ExitAnswers", weight=0.2),
    }
    recipe = make_recipe(problem, model, losses=losses).train()
    heads = {name: codec.client.exits is not None for name, codec in recipe.student.items()}
    assert heads == {"animals": True, "tools": True, "kitchen": True, "ground": False}
    recipe(make_batch(problem), 0.5).loss.backward()
    assert without_gradient(recipe) == []
