"""An encoder that begins behind the detector: one trunk, which all losses train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantis_core.architecture import DetectorConfig, EncoderConfig
from mantis_core.config import LossTerm
from mantis_core.networks.client import latent_size
from mantis_core.networks.cost import macs_of
from mantis_core.tasks import class_members
from mantis_core.training.optim import parameter_groups
from tests.mantis_core.baselines.test_per_task import make_recipe
from tests.mantis_core.conftest import (
    SIZE,
    TASKS,
    make_batch,
    make_codec,
    make_config,
    make_problem,
    make_stage1,
    make_stage2,
)
from tests.mantis_core.recipe_checks import without_gradient

NO_DETECTION = {"logits": LossTerm(criterion="TeacherLogits")}
MLP = "client.detector.mlp."
BODY = "client.detector.body."


def one_trunk(stride: int = 8, deep_channels: int = 0, kind: str = "film") -> Any:
    encoder = EncoderConfig(
        start="detector", channels=16, blocks=1, latent_channels=4, stride=stride
    )
    detector = DetectorConfig(channels=8, blocks=1, hidden=8, deep_channels=deep_channels)
    conditioning = make_config().conditioning.model_copy(update={"kind": kind})
    return make_config(encoder=encoder, detector=detector, conditioning=conditioning)


@pytest.mark.parametrize("deep_channels", [0, 8])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("kind", ["film", "attention", "none"])
def test_a_latent_has_its_size_and_its_stream(stride: int, deep_channels: int, kind: str) -> None:
    problem = make_problem()
    codec = make_codec(problem, one_trunk(stride, deep_channels, kind))
    images = make_batch(problem).image
    seen = list(codec.client_codec().look(images))
    assert seen[0].image.map.shape == (4, *latent_size((SIZE, SIZE), stride))
    streams = codec.encode(images)
    assert len(codec.decode(streams)) == len(images)
    view = codec.client(images.float())
    changed = view._replace(stem=torch.zeros_like(view.stem))
    latents = [codec.client.encode(each, view.logits) for each in (view, changed)]
    assert torch.equal(*latents)  # the stem is read through the detector alone


def test_every_part_learns_in_both_stages() -> None:
    problem = make_problem()
    for recipe in (make_stage1(problem, one_trunk()), make_stage2(problem, one_trunk())):
        recipe.train()
        recipe(make_batch(problem), 0.5).loss.backward()
        assert without_gradient(recipe) == []
    fine_tuned = parameter_groups(recipe.student, loaded=recipe.loaded)["fine_tuned"]
    assert any(name.startswith(BODY) for name in fine_tuned)
    assert any(name.startswith(MLP) for name in fine_tuned)


def test_without_a_loss_of_detection_the_trunk_is_trained_and_its_last_layers_are_new() -> None:
    problem = make_problem()
    recipe = make_stage1(problem, one_trunk(), losses=NO_DETECTION).train()
    recipe(make_batch(problem), 0.5).loss.backward()
    assert without_gradient(recipe) == []
    names = set(recipe.student.shipped())
    assert any(name.startswith(BODY) for name in names)
    assert not any(name.startswith((MLP, "tail.")) for name in names)


def test_codecs_of_one_task_each_train_their_trunk() -> None:
    problem = make_problem()
    recipe = make_recipe(problem, one_trunk()).train()
    recipe(make_batch(problem), 0.5).loss.backward()
    assert without_gradient(recipe) == []
    frozen = parameter_groups(recipe.student, loaded=recipe.loaded)["frozen"]
    parts = {".".join(name.split(".")[2:4]) for name in frozen if ".detector." in name}
    assert parts == {"detector.mlp"}


def test_only_the_last_layers_are_for_detection_alone() -> None:
    members = class_members(TASKS, 6)
    apart = macs_of(make_config(), len(TASKS), (SIZE, SIZE), members)
    joined = macs_of(one_trunk(), len(TASKS), (SIZE, SIZE), members)
    assert joined.detector == 2 * 8 * 8 + 8 * len(TASKS) < apart.detector
