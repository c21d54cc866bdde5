"""Parquet files: labels, columns, and classes read from masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.parquet import ParquetFiles
from tests.data_prep.rows import listed, write_parquet


def test_parquet_labels_become_class_ids(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": b"x", "path": None}] * 2, label=[0, 151])
    source = ParquetFiles(train="a.parquet", class_column="label", class_ids="imagenet")
    assert [ids for _, ids in listed(source, tmp_path)] == [["n01440764"], ["n02085620"]]
    assert [row.image for row in source.read(str(tmp_path), source.listing(str(tmp_path), "train"))]
    source = ParquetFiles(train="a.parquet", class_column="label", class_ids={"0": "cat"})
    with pytest.raises(DataError, match="label 151"):
        source.listing(str(tmp_path), "train")


def test_a_parquet_row_may_carry_several_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 3, wnid=[["a", "b"], [], None])
    source = ParquetFiles(train="a.parquet")
    assert [ids for _, ids in listed(source, tmp_path)] == [["a", "b"], [], []]


def test_a_missing_parquet_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"], label=[1])
    with pytest.raises(DataError, match="no column 'wnid'; it has image, label"):
        ParquetFiles(train="a.parquet").listing(str(tmp_path), "train")


def street_mask(walkers: int, *, palette: bool = False) -> bytes:
    """A mask of road (3) with so many pixels of a pedestrian (9), plain or with colours to see."""
    values = np.full((8, 8), 3, np.uint8)
    values.ravel()[:walkers] = 9
    mask = Image.fromarray(values)
    if palette:
        mask.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


def test_what_a_mask_shows_is_a_class_of_its_image(tmp_path: Path) -> None:
    masks = [street_mask(n) for n in (0, 5, 30)] + [street_mask(30, palette=True), b"damaged"]
    write_parquet(tmp_path / "train.parquet", image=masks, mask=masks)
    settings: dict[str, Any] = {"train": "train.parquet", "class_column": None}
    source = ParquetFiles(
        **settings,
        mask_columns={"scene": "mask"},
        presence={
            "walker": {"mask": "scene", "value": 9, "min_pixels": 6},
            "road": {"mask": "scene", "value": 3},
        },
    )
    classes = [ids for _, ids in listed(source, tmp_path)]
    assert classes == [
        ["no walker", "road"],
        ["no walker", "road"],
        ["walker", "road"],
        ["walker", "road"],
        [],
    ]
    plain = ParquetFiles(**settings, mask_columns={"scene": "mask"})
    root = str(tmp_path)
    assert list(plain.state(root, "train")) != list(source.state(root, "train"))
    with pytest.raises(ValueError, match=r"presence\.walker\.mask: 'depth' is no key"):
        ParquetFiles(**settings, presence={"walker": {"mask": "depth", "value": 9}})
