"""benchmarks/reading.py: the rival sees the same images, and a pass is a whole epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import default_collate

from benchmarks.reading import SEED, Rows, TorchvisionRows, measure, seconds_of
from data_prep.config import DataConfig, TaskConfig
from data_prep.manifest import read_manifest
from data_prep.prepare.shards import prepare
from data_prep.read.batches import local_batches
from data_prep.reading import ReadingConfig
from data_prep.tasks import resolve_tasks

ROWS, BATCH = 60, 8


@pytest.fixture(scope="module")
def folder(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    data = DataConfig(
        sources=({"kind": "shapes", "train_rows": ROWS, "val_rows": 10, "size": 32},),
        image_size=32,
        holdout_fraction=0.1,
    )
    table = resolve_tasks((TaskConfig(name="outline", classes_from="shapes"),), data)
    path: Path = tmp_path_factory.mktemp("reading")
    prepare(data, table, seed=3, output=str(path))
    return str(path)


def test_the_loader_makes_the_crops_of_a_training(folder: str) -> None:
    manifest, reading = read_manifest(folder), ReadingConfig(augmentation="random_resized_crop")
    rows = Rows(folder, manifest, reading)
    ours = {
        int(row_id): image
        for batch in local_batches(
            folder, manifest, reading, seed=SEED, epoch=0, global_batch=BATCH
        )
        for row_id, image in zip(batch["row_id"], batch["image"], strict=True)
    }
    assert len(rows) == manifest.split("train").rows
    theirs = default_collate([rows[index] for index in range(len(rows))])
    shown = 0
    for row_id, image in zip(theirs["row_id"].tolist(), theirs["image"].numpy(), strict=True):
        if row_id in ours:
            shown += 1
            np.testing.assert_array_equal(image, ours[row_id])
    assert shown == len(ours) == len(rows) // BATCH * BATCH


def test_the_loader_of_torchvision_has_the_same_rows_and_shapes(folder: str) -> None:
    manifest, reading = read_manifest(folder), ReadingConfig(augmentation="random_resized_crop")
    ours, theirs = (kind(folder, manifest, reading)[5] for kind in (Rows, TorchvisionRows))
    assert {name: (value.shape, value.dtype) for name, value in ours.items()} == {
        name: (value.shape, value.dtype) for name, value in theirs.items()
    }
    assert ours["row_id"] == theirs["row_id"]


def test_a_pass_that_is_no_whole_epoch_is_not_timed() -> None:
    assert seconds_of(lambda epoch: range(3), 0, 3) >= 0
    with pytest.raises(AssertionError, match="3 batches instead of 4"):
        seconds_of(lambda epoch: range(3), 0, 4)


def test_each_side_has_a_figure(folder: str, tmp_path: Path) -> None:
    found = measure(folder, pairs=1, batch=BATCH, workers=1, cache=tmp_path)
    sides = {"ray", "plain", "cached", "torchvision"}
    assert set(found) == {*sides, "images_per_s", "epoch_start_s"}
    assert min(found.values()) > 0
