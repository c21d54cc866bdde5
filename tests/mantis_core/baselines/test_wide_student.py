"""The student whose encoder has the detector's multiply-adds: it detects nothing and codes all."""

from __future__ import annotations

from pathlib import Path

import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig
from mantis_core.codec.checkpoint import load_client, load_model, save_model
from mantis_core.networks.detector import NoDetector
from tests.mantis_core.conftest import (
    make_batch,
    make_config,
    make_problem,
    make_stage1,
    make_stage2,
)
from tests.mantis_core.recipe_checks import without_gradient

WIDE = make_config(
    conditioning=ConditioningConfig(kind="none"),
    detector=DetectorConfig(channels=24, blocks=2, hidden=8, classes=True),
    prior="shared",
    single_task=True,
    wide_encoder=True,
)


def test_its_stage_1_trains_the_codec_alone() -> None:
    problem = make_problem()
    recipe = make_stage1(problem, WIDE).train()
    found = recipe(make_batch(problem), 0.5)
    found.loss.backward()
    assert without_gradient(recipe) == []
    assert "loss/detection" not in found.sums
    assert not any("detector" in name for name in recipe.student.shipped())


def test_it_is_trained_saved_and_codes_without_a_detector(tmp_path: Path) -> None:
    problem = make_problem()
    recipe = make_stage2(problem, WIDE).train()
    recipe(make_batch(problem), 0.5).loss.backward()
    codec = recipe.student
    assert isinstance(codec.client.detector, NoDetector)
    assert codec.spec.model.encoder.channels > WIDE.encoder.channels
    assert "client.encoder.to_latent.weight" in recipe.loaded
    codec.finish()
    save_model(tmp_path, codec, {})
    images = make_batch(problem).image
    streams = codec.encode(images)
    assert load_client(tmp_path).encode(images) == streams
    answers = load_model(tmp_path).decode(streams)
    assert [answer.tasks for answer in answers] == [(codec.spec.task_names[0],)] * len(images)
    classes = torch.tensor([answer.class_index for answer in answers])
    assert ((classes >= 0) & (classes < 6)).all()
    assert codec.describe()["detector_macs"] == 0
