"""Small images, folders of them, and one prepared set of shapes for the tests of data_prep."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.config import DataConfig, TaskConfig
from data_prep.manifest import Manifest, TaskTable
from data_prep.prepare.shards import prepare
from data_prep.tasks import resolve_tasks

CLASSES = ("n02085620", "n02123045", "n01440764")
SHAPE_TASKS = (
    TaskConfig(name="outline", classes_from="shapes"),
    TaskConfig(name="texture", classes_from="shapes"),
    TaskConfig(name="stroke", classes_from="shapes"),
    TaskConfig(name="regions", kind="segmentation", labels=("background", "red", "green", "blue")),
)


@dataclass(frozen=True)
class Prepared:
    folder: str
    manifest: Manifest
    data: DataConfig
    table: TaskTable


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A random RGB picture of (width, height)."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture(scope="session")
def to_bytes() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train: 12 images of each of three classes, val: 4; every image 16 x 16."""
    seed = 0
    for split, count in (("train", 12), ("val", 4)):
        for class_id in CLASSES:
            folder = tmp_path / "images" / split / class_id
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                (folder / f"{number}.JPEG").write_bytes(encode(picture(seed)))
    return tmp_path / "images"


@pytest.fixture
def folder_data(image_folder: Path) -> DataConfig:
    return DataConfig(
        root=str(image_folder),
        sources=({"kind": "image_folder"},),
        image_size=16,
        holdout_fraction=0.1,
        max_bad_fraction=0.5,
        row_group_rows=4,
    )


@pytest.fixture(scope="session")
def animals() -> tuple[TaskConfig, ...]:
    """Two tasks with one class in common: a small hierarchy."""
    return (
        TaskConfig(name="pets", classes=CLASSES[:2]),
        TaskConfig(name="animals", classes=CLASSES),
    )


@pytest.fixture(scope="session")
def shape_tasks() -> tuple[TaskConfig, ...]:
    """The tasks of the fixture `shapes`."""
    return SHAPE_TASKS


@pytest.fixture(scope="session")
def shapes(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """150 training rows of 32 px shapes in several shards and row groups."""
    data = DataConfig(
        sources=({"kind": "shapes", "train_rows": 150, "val_rows": 30, "size": 32},),
        image_size=32,
        holdout_fraction=0.1,
        row_group_rows=10,
        shuffle_window_rows=40,
        shard_bytes=100_000,
    )
    table = resolve_tasks(SHAPE_TASKS, data)
    folder = str(tmp_path_factory.mktemp("shapes"))
    return Prepared(folder, prepare(data, table, seed=3, output=folder), data, table)
