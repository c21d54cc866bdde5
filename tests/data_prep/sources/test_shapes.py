"""Procedural images: repeatable, with masks where the shapes are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_prep.sources.shapes import REGIONS, TASKS, Shapes


def test_shapes_are_a_function_of_their_seed() -> None:
    source, other = Shapes(train_rows=6, size=32), Shapes(train_rows=6, size=32, seed=1)
    table = source.listing(".", "train")
    images = [row.image for row in source.read(".", table)]
    assert images == [row.image for row in source.read(".", source.listing(".", "train"))]
    assert images != [row.image for row in other.read(".", other.listing(".", "train"))]
    val = source.listing(".", "val").slice(0, 6)
    assert not set(images) & {row.image for row in source.read(".", val)}


def test_shapes_carry_one_or_several_tasks_and_aligned_masks() -> None:
    source = Shapes(train_rows=200, size=32, multi_task_fraction=0.5)
    table = source.listing(".", "train")
    tasks_of_rows = [
        {class_id.split("/")[0] for class_id in ids}
        | ({REGIONS} if REGIONS in row.masks else set())
        for ids, row in zip(table["class_ids"].to_pylist(), source.read(".", table), strict=True)
    ]
    assert {len(tasks) for tasks in tasks_of_rows} == {1, 2}
    assert set.union(*tasks_of_rows) == set(TASKS)
    for row in source.read(".", table):
        for data in row.masks.values():
            mask = np.asarray(Image.open(io.BytesIO(data)))
            pixels = np.asarray(Image.open(io.BytesIO(row.image)))
            assert mask.shape == pixels.shape[:2]
            for value in set(np.unique(mask)) - {0}:
                assert pixels[mask == value].mean(axis=0).argmax() == value - 1
