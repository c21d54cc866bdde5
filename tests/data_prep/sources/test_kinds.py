"""What holds for every kind of source, and the choice of `auto`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.auto import Auto
from data_prep.sources.folder import ImageFolder
from data_prep.sources.kinds import SOURCES
from data_prep.sources.parquet import ParquetFiles
from tests.data_prep.conftest import CLASSES
from tests.data_prep.rows import listed, write_parquet
from tests.data_prep.sources.test_webdataset import write_tar

Make = Callable[..., Image.Image]


Encode = Callable[..., bytes]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_lists_and_reads_the_same_rows(
    kind: str, image_folder: Path, make_picture: Make, to_bytes: Encode
) -> None:
    if kind == "parquet":
        images = [to_bytes(make_picture(n)) for n in range(8)]
        write_parquet(image_folder / "train-0.parquet", image=images, wnid=["n1"] * 8)
    if kind == "webdataset":
        members = {f"{n}.png": to_bytes(make_picture(n), "PNG") for n in range(8)}
        write_tar(image_folder / "train-0.tar", members | {f"{n}.cls": b"0" for n in range(8)})
    patterns = {"parquet": "train-*.parquet", "webdataset": "train-*.tar"}
    settings: dict[str, Any] = {"train": patterns[kind]} if kind in patterns else {}
    if kind in ("mosaic", "attributes"):
        settings = {"of": {"kind": "image_folder"}, "size": 32}
    if kind == "mosaic":
        (image_folder / "train" / "more").mkdir()
        (image_folder / "train" / "more" / "1.png").write_bytes(to_bytes(make_picture(1), "PNG"))
        settings["groups"] = {name: (name,) for name in (*CLASSES, "more")}
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


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("image_folder", {"train": "all", "val": "all"}, "train and val are both 'all'"),
        ("parquet", {"train": "a.parquet", "val": "a.parquet"}, "train and val are both"),
        ("auto", {"train_folder": "x", "val_folder": "x"}, "train_folder and val_folder are both"),
        ("image_folder", {"train": "/data/photos"}, "set path to '/data' and train to 'photos'"),
        ("parquet", {"val": "/a/b/*.parquet"}, r"set path to '/a/b' and val to '\*.parquet'"),
        ("webdataset", {"train": "s3://b/x-*.tar"}, "set path to 's3://b' and train to"),
    ],
)
def test_splits_are_two_places_below_the_source(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SOURCES[kind](kind=kind, **settings)


def test_auto_prefers_parquet_over_folders(image_folder: Path) -> None:
    assert len(listed(Auto(), image_folder)) == 36
    write_parquet(image_folder / "train.parquet", image=[b"x"], wnid=["n1"])
    assert listed(Auto(), image_folder) == [("train.parquet:0", ["n1"])]
