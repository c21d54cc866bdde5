"""Listings and rows of every kind of source."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.schema import DataConfig, DataError, TaskConfig
from data_prep.source_base import REFERENCES, SourceConfig
from data_prep.sources import SOURCES, Auto, source_fingerprint, source_for_path
from data_prep.sources_folder import ImageFolder
from data_prep.sources_parquet import ParquetFiles
from data_prep.sources_shapes import REGIONS, TASKS, Shapes
from data_prep.subgroups import resolve_tasks

Make = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def listed(source: SourceConfig, root: Path, split: str = "train") -> list[tuple[str, list[str]]]:
    table = source.listing(str(root), split)
    assert table.schema.equals(REFERENCES)
    return list(zip(table["source_id"].to_pylist(), table["class_ids"].to_pylist(), strict=True))


def write_parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)


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


def test_a_class_folder_is_the_class_id(image_folder: Path) -> None:
    rows = listed(ImageFolder(), image_folder)
    assert len(rows) == 36
    assert ("train/n02085620/0.JPEG", ["n02085620"]) in rows
    assert rows == sorted(rows)


def test_a_bare_folder_of_classes_is_one_split(image_folder: Path) -> None:
    source = ImageFolder(path="val", train=None, val=".")
    assert len(listed(source, image_folder, "val")) == 12
    assert listed(source, image_folder, "train") == []


def test_the_official_tiny_imagenet_layout_is_read(
    tmp_path: Path, make_picture: Make, to_bytes: Encode
) -> None:
    (tmp_path / "train/n1/images").mkdir(parents=True)
    (tmp_path / "train/n1/images/n1_0.JPEG").write_bytes(to_bytes(make_picture(0)))
    (tmp_path / "train/n1/n1_boxes.txt").write_text("n1_0.JPEG\t0\t0\t9\t9\n")
    (tmp_path / "val/images").mkdir(parents=True)
    (tmp_path / "val/images/val_0.JPEG").write_bytes(to_bytes(make_picture(1)))
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t9\t9\n")
    assert listed(ImageFolder(), tmp_path) == [("train/n1/images/n1_0.JPEG", ["n1"])]
    assert listed(ImageFolder(), tmp_path, "val") == [("val/images/val_0.JPEG", ["n1"])]


def test_a_flat_val_folder_is_labelled_by_a_csv(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for name in ("a.JPEG", "b.JPEG"):
        (tmp_path / "val" / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("ImageId,PredictionString\na,n1 1 2 3 4\n")
    source = ImageFolder(val_labels="labels.csv")
    with pytest.raises(DataError, match=r"no line for 1 of 2 images, the first is b\.JPEG"):
        source.listing(str(tmp_path), "val")
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("b,n2 1 2 3 4\n")
    assert [ids for _, ids in listed(source, tmp_path, "val")] == [["n1"], ["n2"]]


def test_a_missing_folder_names_the_path_and_the_key(tmp_path: Path) -> None:
    for source in (ImageFolder(), Auto(), ParquetFiles(train="*.parquet")):
        with pytest.raises(DataError, match=rf"{tmp_path}.*set data\.root"):
            source.listing(str(tmp_path), "train")


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


def test_auto_prefers_parquet_over_folders(image_folder: Path) -> None:
    assert len(listed(Auto(), image_folder)) == 36
    write_parquet(image_folder / "train.parquet", image=[b"x"], wnid=["n1"])
    assert listed(Auto(), image_folder) == [("train.parquet:0", ["n1"])]


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


def test_the_fingerprint_follows_content_not_place_or_date(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    table = resolve_tasks(animals, folder_data)
    first = source_fingerprint(folder_data, table)
    shutil.copytree(image_folder, tmp_path / "moved")
    moved = folder_data.model_copy(update={"root": str(tmp_path / "moved")})
    assert source_fingerprint(moved, table) == first
    (tmp_path / "moved/val/n02085620/0.JPEG").write_bytes(b"other size")
    assert source_fingerprint(moved, table) != first


def test_a_bare_path_is_scored_as_val(image_folder: Path, tmp_path: Path) -> None:
    like = DataConfig(sources=({"kind": "shapes"},))
    folder = source_for_path(str(image_folder), like)
    assert len(listed(folder, tmp_path, "val")) == 12
    assert len(listed(source_for_path(str(image_folder / "train"), like), tmp_path, "val")) == 36
    write_parquet(tmp_path / "p/x.parquet", picture=[b"x"], kind=["n1"], image=[b"y"], label=[3])
    plain = source_for_path(str(tmp_path / "p/x.parquet"), like)
    assert listed(plain, tmp_path, "val") == [("x.parquet:0", ["3"])]
    like = DataConfig(sources=({"kind": "parquet", "image": "picture", "class_column": "kind"},))
    named = source_for_path(str(tmp_path / "p"), like)
    assert listed(named, tmp_path, "val") == [("x.parquet:0", ["n1"])]
    assert next(named.read(str(tmp_path), named.listing(str(tmp_path), "val"))).image == b"x"
    with pytest.raises(DataError, match="nothing to score"):
        source_for_path(str(tmp_path / "absent"), like)


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
