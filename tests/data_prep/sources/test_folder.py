"""Folders of images: layouts and label files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from data_prep.errors import DataError
from data_prep.sources.base import notes_of
from data_prep.sources.folder import ImageFolder
from tests.data_prep.rows import listed

Make = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def test_a_class_folder_is_the_class_id(image_folder: Path) -> None:
    rows = listed(ImageFolder(), image_folder)
    assert len(rows) == 36
    assert ("train/n02085620/0.JPEG", ["n02085620"]) in rows
    assert rows == sorted(rows)


def test_rows_are_sorted_by_path_whatever_the_classes_are_called(tmp_path: Path) -> None:
    names = ("a", "a b", "a-b", "a0", "B", "é", "日", "a/below")
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in ("10.png", "9.png", "z.png"):
            (tmp_path / "train" / name / file).touch()
    paths = [path for path, _ in listed(ImageFolder(), tmp_path)]
    assert paths == sorted(
        f"train/{name}/{file}" for name in names for file in ("10.png", "9.png", "z.png")
    )


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


def photos(root: Path, *names: str) -> Path:
    """Empty files at these paths."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def raw(root: Path, folder: str, name: bytes) -> None:
    """An empty file whose name is not UTF-8."""
    with open(os.path.join(os.fsencode(root / folder), name), "wb"):
        pass


def test_what_systems_and_editors_keep_is_passed_over(tmp_path: Path) -> None:
    names = ("train/cat/1.jpg", "train/cat/._1.jpg", "train/.ipynb_checkpoints/1.jpg")
    photos(tmp_path, *names, "train/cat/.ipynb_checkpoints/1.jpg", "train/cat/.DS_Store")
    assert listed(ImageFolder(), tmp_path) == [("train/cat/1.jpg", ["cat"])]
    assert notes_of(ImageFolder().listing(str(tmp_path), "train")) == []


def test_files_of_other_kinds_and_images_outside_classes_are_counted(tmp_path: Path) -> None:
    others = [f"train/cat/{number}.jfif" for number in range(3)]
    photos(tmp_path, *others, "train/cat/a.AVIF", "train/dog/notes", "train/dog/1.jpg")
    photos(tmp_path, "train/b.png", "train/a.png", "train/readme.txt")
    assert notes_of(ImageFolder().listing(str(tmp_path), "train")) == [
        "left out 5 files of other kinds: .jfif 3, .avif 1, none 1",
        "left out 2 images in no class folder, such as a.png",
    ]


def test_a_label_file_is_no_file_of_another_kind(tmp_path: Path) -> None:
    photos(tmp_path, "val/1.jpg", "val/x.avif")
    (tmp_path / "val/labels.csv").write_text("1.jpg,cat\n")
    source = ImageFolder(train=None, val_labels="val/labels.csv")
    listing = source.listing(str(tmp_path), "val")
    assert notes_of(listing) == ["left out 1 file of other kinds: .avif 1"]


def test_an_image_whose_name_is_not_utf8_is_rejected_by_its_escaped_name(tmp_path: Path) -> None:
    photos(tmp_path, "train/cat/1.jpg")
    raw(tmp_path, "train/cat", b"caf\xe9.jpg")
    raw(tmp_path, "train/cat", b"caf\xe9.txt")
    raw(tmp_path, "train", b"caf\xe9.txt")
    source, root = ImageFolder(), str(tmp_path)
    listing = source.listing(root, "train")
    assert listing["source_id"].to_pylist() == ["train/cat/1.jpg", "train/cat/caf\\xe9.jpg"]
    assert [row.error for row in source.read(root, listing)] == [
        "",
        "its name is not UTF-8; rename it",
    ]
    assert [line.split("\t")[-1] for line in source.state(root, "train")][1] == "unreadable"


def test_a_class_folder_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    photos(tmp_path, "train/cat/1.jpg")
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"train", b"caf\xe9"))
    with pytest.raises(DataError, match=r"train has a folder whose name is not UTF-8: caf\\xe9"):
        ImageFolder().listing(str(tmp_path), "train")


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    scandir = os.scandir

    def refused(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"train/dog cannot be read \(Permission denied\)"):
        ImageFolder().listing(str(tmp_path), "train")


def test_links_are_followed_and_what_they_miss_is_a_rejected_image(tmp_path: Path) -> None:
    photos(tmp_path, "else/1.jpg")
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "train/cat/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "train/cat/up").symlink_to("..")
    (tmp_path / "train/dog").symlink_to(tmp_path / "else")
    source, root = ImageFolder(), str(tmp_path)
    listing = source.listing(root, "train")
    names = [name.removeprefix("train/") for name in listing["source_id"].to_pylist()]
    assert names == ["cat/gone.jpg", "cat/loop.jpg", "cat/up/dog/1.jpg", "dog/1.jpg"]
    gone, loop, *others = source.read(root, listing)
    assert gone.error == "file is gone"
    assert "cannot be read" in loop.error
    assert [row.error for row in others] == ["", ""]
