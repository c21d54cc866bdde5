"""Folders of images: layouts and label files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.folder import ImageFolder
from tests.data_prep.rows import listed

Make = Callable[..., Image.Image]
Encode = Callable[..., bytes]


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


def test_a_file_that_cannot_be_read_is_a_row_with_its_reason(image_folder: Path) -> None:
    source, root = ImageFolder(), str(image_folder)
    (image_folder / "train/n02085620/0.JPEG").unlink()
    (image_folder / "train/n02085620/0.JPEG").symlink_to("0.JPEG")  # to itself
    rows = source.listing(root, "val").slice(0, 1).to_pylist()
    rows[0]["path"] = "train/n02085620/0.JPEG"
    (row,) = source.read(root, pa.Table.from_pylist(rows))
    assert not row.image
    assert row.error.startswith("cannot be read: ")
    assert list(source.state(root, "train"))
