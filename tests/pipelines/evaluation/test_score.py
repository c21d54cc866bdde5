"""A model is scored beside its teacher, with labels and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from data_prep.config import DataConfig
from mantis_core.codec.checkpoint import save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import model_spec
from mantis_core.config import TeacherConfig
from mantis_core.tasks import Problem, TaskSpec
from mantis_core.training.teacher import new_teacher
from pipelines.commands.errors import Stopped
from pipelines.commands.score import _check_teacher, _settings_around
from pipelines.evaluation.score import evaluate_model
from tests.mantis_core.conftest import make_config
from tests.pipelines.commands.test_streams import picture

CLASSES = ("cat", "dog", "pie", "jam")
NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untrained codec of two tasks, saved as a stage 2 would, and a teacher's weights."""
    torch.manual_seed(0)
    tasks = (
        TaskSpec("pets", "classification", 2, (0, 1), CLASSES[:2]),
        TaskSpec("food", "classification", 2, (2, 3), CLASSES[2:]),
    )
    problem = Problem(tasks, CLASSES, CLASSES, True, (32, 32), 32)
    teacher = new_teacher(TeacherConfig(name=NAME, weights="train", split="stage2"), problem)
    codec = Mantis(model_spec(make_config(), teacher, problem))
    codec.finish()
    data = DataConfig(sources=({"kind": "image_folder"},), image_size=32).model_dump(mode="json")
    preparation = {"data": data, "masks": ["", ""], "ignored": [[], []], "seed": 0}
    meta = {"stage": "stage2", "preparation": {**preparation, "batch_size": 8}}
    save_model(tmp_path / "model", codec, meta)
    net = torchvision.models.get_model(NAME, num_classes=4)
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    return tmp_path / "model"


def scored(model: Path, data: Path) -> dict[str, Any]:
    weights = str(model.parent / "teacher.pth")
    settings = _settings_around(model, weights)
    _check_teacher(model, settings.teacher)
    root = str(model.parent / "runs")
    return evaluate_model(model, str(data), settings, root, with_teacher=True)


@pytest.mark.usefixtures("ray_session")
def test_a_teacher_stands_beside_the_model_and_names_what_has_no_labels(
    model: Path, tmp_path: Path
) -> None:
    for number in range(6):
        picture(tmp_path / "photos" / CLASSES[number % 4] / f"{number}.png")
        picture(tmp_path / "flat" / f"{number}.png")
    labelled = scored(model, tmp_path / "photos")
    assert {"val/top1", "val/agreement"} <= set(labelled["metrics"])
    assert "val/top1" in labelled["teacher"]
    assert not [name for name in labelled["teacher"] if "agreement" in name]
    assert labelled["chance"] is not None

    (tmp_path / "flat/broken.png").write_bytes(b"no image")
    found = scored(model, tmp_path / "flat")
    assert (found["rows"], found["rejected"], found["unassigned"]) == (6, 1, 0)
    assert 0 <= found["metrics"]["val/agreement"] <= 1
    assert found["metrics"]["val/wire_bytes"] > 0
    assert not [name for name in found["metrics"] if "top1" in name or "decoded" in name]
    assert (found["teacher"], found["chance"]) == ({}, None)
    assert any("have no labels: shufflenet_v2_x0_5 named them" in r for r in found["remarks"])
    assert not list((tmp_path / "runs").rglob("labels.csv"))
    json.dumps(found, allow_nan=False)


def test_weights_that_do_not_know_the_models_classes_are_refused(model: Path) -> None:
    with pytest.raises(Stopped, match=r"know ImageNet's classes, and the model's \(cat, dog, pie"):
        _check_teacher(model, _settings_around(model, "pretrained").teacher)
    net = torchvision.models.get_model(NAME, num_classes=7)
    torch.save(net.state_dict(), model.parent / "other.pth")
    other = str(model.parent / "other.pth")
    with pytest.raises(ValueError, match="has 7 logits, the data has 4 classes"):
        _check_teacher(model, _settings_around(model, other).teacher)
