"""Unusual but valid experiments: each runs from images to a table, or ends before any training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torchvision
import yaml
from safetensors.torch import save_file

from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from tests.pipelines.experiment import last_json, mantis

OUTLINES = [f"outline/{name}" for name in ("triangle", "square", "circle", "star")]
TEXTURES = [f"texture/{name}" for name in ("rows", "columns", "checks", "dots")]
TWO_TASKS = [{"name": "outline", "classes": OUTLINES}, {"name": "texture", "classes": TEXTURES}]


def config_of(folder: Path, tasks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Returns a config of drawn shapes whose networks are as small as they may be."""
    stage: dict[str, Any] = {"epochs": 1, "batch_size": 16}
    small = {"channels": 8, "blocks": 0}
    source = {"kind": "shapes", "train_rows": 160, "val_rows": 24, "size": 32}
    config: dict[str, Any] = {
        "data": {
            "sources": [{**source, "multi_task_fraction": 0.0}],
            "image_size": 32,
            "holdout_fraction": 0.2,
        },
        "tasks": tasks,
        "teacher": {
            "name": "shufflenet_v2_x0_5",
            "weights": "train",
            "split": "stage2",
            "training": {**stage, "optim": {"kind": "adamw", "lr": 1e-3}, "ema_decay": 0},
        },
        "model": {
            "stem": {"channels": [8, 8]},
            "detector": {**small, "hidden": 8},
            "encoder": {**small, "latent_channels": 4},
            "decoder": {**small, "task_channels": 8},
        },
        "stage1": stage,
        "stage2": stage,
        "individual": stage,
        "evaluate": {
            "baselines": ["oracle", "per_task", "individual", "teacher"],
            "codecs": {"webp": [5]},
            "batch_size": 16,
        },
        "storage": {"root": str(folder / "runs")},
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    return config


def evaluated(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Runs the config without Ray. Returns each arm's figures from strictly valid JSON."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = mantis("run", "--plain", "--config", str(path), "--json", folder=folder)
    assert {stage["status"] for stage in last_json(done)["stages"].values()} == {"ran"}
    written = next((folder / "runs/stages").glob("evaluate-*/evaluation.json"))
    result = json.loads(written.read_text(), parse_constant=lambda text: pytest.fail(text))
    figures = {arm["kind"]: arm["metrics"] for arm in result["arms"]}
    assert figures.keys() == {"mantis", "oracle", "per_task", "individual", "webp", "teacher"}
    assert figures["mantis"]["val/wire_bytes"] > 0
    for each in figures.values():
        assert all(math.isfinite(value) for value in each.values() if value is not None)
    return figures


def flat_teacher(folder: Path, classes: list[str]) -> dict[str, Any]:
    """Writes a teacher with one head over all classes, as pretrained ones have."""
    name = "shufflenet_v2_x0_5"
    network = torchvision.models.get_model(name, weights=None, num_classes=len(classes))
    save_file(network.state_dict(), folder / "teacher.safetensors")
    return {"weights": str(folder / "teacher.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestARunFromImagesToATable:
    def test_with_one_task(self, tmp_path):
        figures = evaluated(tmp_path, config_of(tmp_path, TWO_TASKS[:1]))
        assert 0 <= figures["mantis"]["val/task/outline/top1"] <= 1

    def test_with_a_segmentation_alone(self, tmp_path):
        labels = ["background", "red", "green", "blue"]
        tasks = [{"name": "regions", "kind": "segmentation", "labels": labels}]
        figures = evaluated(tmp_path, config_of(tmp_path, tasks))
        assert 0 <= figures["mantis"]["val/task/regions/miou"] <= 1

    def test_with_tasks_named_like_methods_of_a_network(self, tmp_path):
        tasks = [{"name": "train", "classes": OUTLINES}, {"name": "items", "classes": TEXTURES}]
        figures = evaluated(tmp_path, config_of(tmp_path, tasks))
        assert {"val/task/train/top1", "val/task/items/top1"} <= figures["mantis"].keys()

    def test_with_images_of_several_classes_and_a_flat_teacher(self, tmp_path):
        config = config_of(tmp_path, TWO_TASKS, teacher=flat_teacher(tmp_path, OUTLINES + TEXTURES))
        # With fewer than 50 images nobody can tell that this teacher is not trained.
        config["data"]["sources"][0] |= {"multi_task_fraction": 0.5, "train_rows": 64}
        evaluated(tmp_path, config)
        history = next((tmp_path / "runs/stages").glob("stage2-*/history.json"))
        last = json.loads(history.read_text())[-1]
        assert last["train/loss/distillation"] > 0

    def test_at_100_pixels_with_the_split_after_layer1(self, tmp_path):
        changes = {"data": {"image_size": 100}, "teacher": {"name": "resnet18", "split": "layer1"}}
        evaluated(tmp_path, config_of(tmp_path, TWO_TASKS, **changes))


def test_300_tasks_are_refused_when_the_config_is_read(tmp_path):
    tasks = [
        {"name": f"task_{index}", "classes": [f"c{index}a", f"c{index}b"]} for index in range(300)
    ]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(tmp_path, tasks)))
    with pytest.raises(SettingsError, match=r"there are 300.*256"):
        load_settings(path)
