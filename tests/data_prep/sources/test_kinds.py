"""What holds for every kind of source, and the choice of `auto`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.folder import ImageFolder
from data_prep.sources.kinds import SOURCES, Auto
from data_prep.sources.parquet import ParquetFiles
from tests.data_prep.rows import listed, write_parquet

Make = Callable[..., Image.Image]


Encode = Callable[..., bytes]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_lists_and_reads_the_same_rows(
    kind: str, image_folder: Path, make_picture: Make, to_bytes: Encode
) -> None:
    if kind == "parquet":
        images = [to_bytes(make_picture(n)) for n in range(8)]
        write_parquet(image_folder / "train-0.parquet", image=images, wnid=["n1"] * 8)
    settings: dict[str, Any] = {"train": "train-*.parquet"} if kind == "parquet" else {}
    source = SOURCES[kind](kind=kind, **settings)
    root = str(image_folder)
    table = source.listing(root, "train")
    some = table.take([0, 1, 4, 6])
    rows = list(source.read(root, some))
    assert len(rows) == 4
    assert all(Image.open(io.BytesIO(row.image)).size[0] >= 16 for row in rows)
    assert rows == list(source.read(root, some))
    assert len(set(table["source_id"].to_pylist())) == table.num_rows > 0
    assert list(source.state(root, "train")) == list(source.state(root, "train"))


def test_a_missing_folder_names_the_path_and_the_key(tmp_path: Path) -> None:
    for source in (ImageFolder(), Auto(), ParquetFiles(train="*.parquet")):
        with pytest.raises(DataError, match=rf"{tmp_path}.*set data\.root"):
            source.listing(str(tmp_path), "train")


def test_auto_prefers_parquet_over_folders(image_folder: Path) -> None:
    assert len(listed(Auto(), image_folder)) == 36
    write_parquet(image_folder / "train.parquet", image=[b"x"], wnid=["n1"])
    assert listed(Auto(), image_folder) == [("train.parquet:0", ["n1"])]
