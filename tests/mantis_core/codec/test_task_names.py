"""Tasks whose names are attributes of modules, through all that is built by task name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mantis_core.architecture import ModelConfig
from mantis_core.baselines.per_task import load_codecs, per_task_recipe
from mantis_core.baselines.uncompressed import individual_recipe
from mantis_core.codec.checkpoint import load_client, load_model, load_server
from mantis_core.config import Stage2Config
from mantis_core.tasks import Problem
from mantis_core.training.stage1 import Stage1Recipe
from mantis_core.training.stage2 import Stage2Recipe
from tests.mantis_core.conftest import QUICK, make_batch, make_problem, make_stage1
from tests.mantis_core.recipe_checks import train

NAMES = ("train", "items", "type", "to")


def awkward(*, single_class: bool = False) -> Problem:
    return make_problem(single_class=single_class, names=NAMES)


def test_a_codec_is_trained_saved_loaded_and_used_under_such_names(
    stage2_of: Callable[..., Stage2Recipe], tmp_path: Path
) -> None:
    problem = awkward()
    recipe, batch = stage2_of(problem), make_batch(problem)
    train(recipe, [batch])
    recipe.save(recipe.student.eval(), tmp_path, "stage2", {})
    whole, client, server = load_model(tmp_path), load_client(tmp_path), load_server(tmp_path)
    streams = client.encode(batch.image, ["train", "to"])
    assert streams == whole.encode(batch.image, ["train", "to"])
    answers = server.decode(streams)
    assert all(answer.tasks == ("train", "to") for answer in answers)
    assert answers[0].labels.keys() == {"train"}
    assert answers[0].segmentation["to"].shape == (32, 32)
    assert [a.to_dict() for a in answers] == [a.to_dict() for a in whole.decode(streams)]


def test_stage_1_and_a_teacher_of_heads_train_under_such_names(
    stage1_of: Callable[..., Stage1Recipe],
) -> None:
    problem = awkward()
    recipe = stage1_of(problem)
    assert list(recipe.teacher.heads) == list(NAMES)  # type: ignore[union-attr]
    train(recipe, [make_batch(problem)])


def test_a_codec_a_task_is_trained_saved_and_loaded_under_such_names(
    small_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    problem = awkward(single_class=True)
    first, batch = make_stage1(problem), make_batch(problem)
    recipe: Any = per_task_recipe(
        Stage2Config(**QUICK),  # type: ignore[arg-type]
        small_config(per_task=True),
        first.teacher,  # type: ignore[arg-type]
        problem,
        first.student.shipped(),
        seed=0,
    )
    recipe(batch, 0.5).loss.backward()
    recipe.save(recipe.student.eval(), tmp_path, "stage2", {})
    loaded = load_codecs(tmp_path)
    for name in NAMES[:3]:
        streams = recipe.student[name].encode(batch.image)
        assert loaded[name].encode(batch.image) == streams  # type: ignore[operator]
        answers = loaded[name].decode(streams)  # type: ignore[operator]
        assert {key for answer in answers for key in answer.labels} == {name}


def test_an_uncompressed_network_a_task_answers_under_such_names() -> None:
    problem = awkward()
    teacher = make_stage1(problem).teacher
    recipe = individual_recipe(teacher, problem, seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        output = recipe.eval()(make_batch(problem), 1.0)
    assert output.sums["top1/asked"] > 0
    assert torch.isfinite(output.loss)
