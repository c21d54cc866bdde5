"""A whole small experiment for tests: images in ImageNet's layout, a config, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from data_prep.manifest import read_manifest
from data_prep.read.batches import local_batches
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch
from mantis_core.training.meter import consumed_rows, hash_of_rows
from pipelines.__main__ import app
from pipelines.settings.reading import load_settings
from pipelines.stages.order import STAGES
from pipelines.training.job import stage_seed
from tests.root import ROOT

CLASSES = {"n02085620": 0, "n02085782": 1, "n02123045": 2, "n02123159": 3}
VAL_ROWS = 9
SIZE = 32


def paint(folder: Path, *, train: int = 34) -> None:
    """An ImageNet-layout folder with `train` images a class: each class a colour, with noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", VAL_ROWS)):
        for wnid, number in CLASSES.items():
            (folder / split / wnid).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(_pixels(random, number))
                image.save(folder / split / wnid / f"{wnid}_{index}.JPEG", quality=95)


def _pixels(random: np.random.Generator, number: int) -> NDArray[np.uint8]:
    pixels = random.integers(0, 60, (SIZE, SIZE, 3))
    pixels[..., number % 3] += 60 * (1 + number // 2)
    return pixels.astype(np.uint8)


def fitted_teacher() -> dict[str, torch.Tensor]:
    """A teacher that knows the painted classes: random weights, and a last layer by ridge
    regression."""
    torch.manual_seed(0)
    network = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=4).eval()
    random = np.random.default_rng(1)
    numbers = np.repeat(list(CLASSES.values()), 24)
    painted = np.stack([_pixels(random, number) for number in numbers]).transpose(0, 3, 1, 2)
    layer, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        features = network(normalise(torch.from_numpy(painted))).double()
        mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-12
        known = (features - mean) / deviation
        right = torch.eye(4, dtype=torch.float64)[torch.from_numpy(numbers)] - 0.25
        kernel = known @ known.T / known.shape[1] + 0.01 * torch.eye(len(known))
        weight = known.T @ torch.linalg.solve(kernel, right) / known.shape[1] / deviation[:, None]
        layer.weight.copy_(4 * weight.T)
        layer.bias.copy_(-4 * mean @ weight)
    network.fc = layer
    return dict(network.state_dict())


def write_config(folder: Path) -> Path:
    """A config with two tasks of two classes, a teacher's file, and two workers."""
    weights = folder / "teacher.safetensors"
    save_file(fitted_teacher(), weights)
    stage: dict[str, Any] = {"epochs": 1, "batch_size": 16}
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
        "evaluate": {
            "baselines": ["oracle", "teacher"],
            "codecs": {"webp": [5, 75]},
            "batch_size": 16,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1},
        "storage": {"root": str(folder / "runs")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def planned_hashes(config: Path, stage: str, *overrides: str) -> list[str]:
    """Hashes of the rows a finished training should have consumed in each epoch, on one worker."""
    settings = load_settings(config, overrides)
    folder = str(next(Path(settings.storage.root, "stages").glob("prepare-*")))
    training, manifest = attrgetter(STAGES[stage].section)(settings), read_manifest(folder)
    hashes = []
    for epoch in range(training.epochs):
        batches = local_batches(
            folder,
            manifest,
            settings.data.reading,
            global_batch=training.batch_size,
            seed=stage_seed(settings.seed, stage),
            epoch=epoch,
        )
        first = epoch * (manifest.split("train").rows // training.batch_size)
        rows = [consumed_rows(step, Batch.from_arrays(b)) for step, b in enumerate(batches, first)]
        hashes.append(hash_of_rows(torch.cat(rows)))
    return hashes


def mantis(
    *arguments: str, folder: Path, code: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`mantis ARGUMENTS` run in `folder` as a user would: without this suite's own settings of Ray.

    Asserts the exit code.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
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


def mantis_here(*arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """As `mantis` above, in this process: the program's imports take seconds.

    For commands that start no Ray and end no process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(app, list(arguments), prog_name="mantis")
    assert done.exit_code == code, done.output[-3000:]
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The object a `--json` command printed."""
    return json.loads(done.stdout.strip().splitlines()[-1])
