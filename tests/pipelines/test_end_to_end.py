"""The main job as a user runs it: real Ray Data, Ray Train with two workers, MLflow, bitstreams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
import yaml
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file

CLASSES = {"n02085620": 0, "n02085782": 1, "n02123045": 2, "n02123159": 3}
ROWS = {"train": 34, "val": 9}
SIZE = 32


def paint(folder: Path) -> None:
    """An ImageNet-layout folder: each class a colour, with noise."""
    random = np.random.default_rng(0)
    for split, count in ROWS.items():
        for wnid, number in CLASSES.items():
            (folder / split / wnid).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (SIZE, SIZE, 3))
                pixels[..., number % 3] += 60 * (1 + number // 2)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / wnid / f"{wnid}_{index}.JPEG", quality=95)


def write_config(folder: Path) -> Path:
    teacher = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=4)
    weights = folder / "teacher.safetensors"
    save_file(teacher.state_dict(), weights)
    stage = {"epochs": 1, "batch_size": 16}
    small = {"channels": 8, "blocks": 0}
    config = {
        "data": {
            "root": str(folder / "images"),
            "sources": [{"kind": "image_folder"}],
            "image_size": SIZE,
            "holdout_fraction": 0.2,
            "max_bad_fraction": 0.1,
        },
        "tasks": [
            {"name": "dogs", "classes": ["n02085620", "n02085782"]},
            {"name": "cats", "classes": ["n02123045", "n02123159"]},
        ],
        "teacher": {"name": "shufflenet_v2_x0_5", "weights": str(weights), "split": "stage2"},
        "model": {
            "stem": {"channels": [8, 8]},
            "detector": {**small, "hidden": 8},
            "encoder": {**small, "latent_channels": 4},
            "decoder": {**small, "task_channels": 8},
        },
        "stage1": stage,
        "stage2": stage,
        "evaluate": {"baselines": ["oracle", "teacher"], "batch_size": 16},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1},
        "storage": {"root": str(folder / "runs")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def mantis(*arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the whole chain has run once, with one broken image among the good."""
    folder = tmp_path_factory.mktemp("chain")
    paint(folder / "images")
    (folder / "images/train/n02085620/broken.JPEG").write_text("no image")
    config = write_config(folder)
    result = last_json(mantis("run", "--config", str(config), "--json", folder=folder))
    return folder, config, result


@pytest.mark.timeout(900)
def test_the_chain_runs_every_stage_and_measures_real_streams(finished):
    folder, _, result = finished
    assert {name: stage["status"] for name, stage in result["stages"].items()} == {
        name: "ran" for name in ("prepare", "stage1", "stage2", "evaluate", "register")
    }
    metrics = result["metrics"]
    assert metrics["val/wire_bytes"] > metrics["val/payload_bytes"] > 0
    assert metrics["val/bpp"] == pytest.approx(metrics["val/wire_bytes"] * 8 / SIZE**2)
    gap = abs(metrics["val/estimated_bytes"] - metrics["val/payload_bytes"])
    assert gap <= 0.01 * metrics["val/payload_bytes"] + 8
    assert 0 <= metrics["val/top1"] <= 1
    prepared = next((folder / "runs/stages").glob("prepare-*"))
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["rejected"] == 1
    assert manifest["splits"]["val"]["rows"] == ROWS["val"] * len(CLASSES)


@pytest.mark.timeout(900)
def test_mlflow_has_one_run_a_stage_and_no_step_twice(finished):
    folder, _, result = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    runs = client.search_runs([parent.info.experiment_id])
    names = sorted(run.data.tags.get("mantis.stage", "") for run in runs)
    assert names == ["", "evaluate", "prepare", "register", "stage1", "stage2"]
    for run in runs:
        if run.data.tags.get("mantis.stage") in ("stage1", "stage2"):
            steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
            assert steps == [1]


@pytest.mark.timeout(900)
def test_a_second_run_skips_everything(finished):
    folder, config, result = finished
    again = last_json(mantis("run", "--config", str(config), "--json", folder=folder))
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert again["metrics"] == result["metrics"]
    assert again["run_id"] == result["run_id"]


@pytest.mark.timeout(900)
def test_scoring_the_registered_model_gives_the_chains_own_figures(finished):
    folder, _, result = finished
    data = str(folder / "images")
    done = mantis(
        "evaluate", "--model", "models:/mantis@candidate", "--data", data, "--json", folder=folder
    )
    scored = last_json(done)["metrics"]
    for name in ("val/top1", "val/wire_bytes", "val/payload_bytes"):
        assert scored[name] == result["metrics"][name]


@pytest.mark.timeout(900)
def test_the_registered_model_codes_an_image_file(finished):
    folder, _, _ = finished
    image = next((folder / "images/val/n02123045").iterdir())
    model = "models:/mantis@candidate"
    mantis("encode", model, str(image), "-o", "one.mts", folder=folder)
    answer = last_json(mantis("decode", model, "one.mts", "--json", folder=folder))
    assert answer["wire_bytes"] == (folder / "one.mts").stat().st_size
    assert 0 <= answer["class_index"] < len(CLASSES)
    damaged = bytearray((folder / "one.mts").read_bytes())
    damaged[-6] ^= 1
    (folder / "damaged.mts").write_bytes(damaged)
    refused = mantis("decode", model, "damaged.mts", folder=folder, code=2)
    assert len(refused.stderr.strip().splitlines()) == 1
