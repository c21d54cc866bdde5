"""How a folder of image files is read, and what is said where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.starting.found import look
from pipelines.starting.reading import StartError
from tests.pipelines.starting.photos import photos


def source(folder: Path, labels: str | None = None) -> dict[str, Any]:
    return dict(look([folder], labels).reading.source)


def test_class_folders_are_one_split(tmp_path: Path) -> None:
    found = look([photos(tmp_path, {"cat": 3, "dog": 2})])
    assert found.reading.source == {"kind": "image_folder", "train": ".", "val": None}
    assert found.counts == {"cat": 3, "dog": 2}
    assert (found.train_images, found.val_images, found.short_side) == (5, 0, 60)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Test"])
def test_split_folders_are_found_by_their_usual_names(tmp_path: Path, val: str) -> None:
    photos(tmp_path, {"train/cat": 2, "train/dog": 2, f"{val}/cat": 1, f"{val}/dog": 1})
    found = look([tmp_path])
    assert found.reading.source == {"kind": "image_folder", "train": "train", "val": val}
    assert (found.train_images, found.val_images) == (4, 2)


def test_a_second_split_for_measuring_is_left_out_and_named(tmp_path: Path) -> None:
    classes = [f"{split}/{name}" for split in ("train", "val", "test") for name in ("a", "b")]
    found = look([photos(tmp_path, dict.fromkeys(classes, 1))])
    assert found.reading.source["val"] == "val"
    assert "test/ is not used: val/ is the val split" in found.notes


def test_images_without_classes_are_no_val_split(tmp_path: Path) -> None:
    found = look([photos(tmp_path, {"train/a": 2, "train/b": 2, "test": 3})])
    assert found.reading.source["val"] is None
    assert "test/ is not used: its images have no classes" in found.notes


def test_a_label_file_gives_flat_images_their_classes(tmp_path: Path) -> None:
    photos(tmp_path, {"images": 4})
    (tmp_path / "labels.csv").write_text(
        "filename,label\n" + "".join(f"{n}.jpg,{'ab'[n % 2]}\n" for n in range(4))
    )
    (tmp_path / "readme.txt").write_text("photographs of a and b\n")
    found = look([tmp_path])
    assert found.reading.source["train_labels"] == "labels.csv"
    assert found.counts == {"a": 2, "b": 2}
    assert look([tmp_path / "labels.csv"]).reading.source == found.reading.source


def test_splits_may_have_label_files(tmp_path: Path) -> None:
    photos(tmp_path, {"train": 4, "val": 2})
    for split, count in (("train", 4), ("val", 2)):
        lines = [f"{split}/{n}.jpg,{'ab'[n % 2]}" for n in range(count)]
        (tmp_path / f"{split}.csv").write_text("file,class\n" + "\n".join(lines))
    found = look([tmp_path])
    assert found.reading.source["train_labels"] == "train.csv"
    assert found.reading.source["val_labels"] == "val.csv"
    assert (found.train_images, found.val_images) == (4, 2)


def test_tiny_imagenets_folder_is_read_as_it_lies(tmp_path: Path) -> None:
    photos(tmp_path, {"train/n1/images": 2, "train/n2/images": 2, "val/images": 2})
    (tmp_path / "val/val_annotations.txt").write_text(
        "0.jpg\tn1\t0\t0\t9\t9\n1.jpg\tn2\t0\t0\t9\t9\n"
    )
    assert source(tmp_path) == {"kind": "image_folder", "train": "train", "val": "val"}


def test_few_images_of_a_class_and_what_has_no_class_are_noted(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 20, "dog": 2, ".": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat/1.heic").write_bytes(b"x")
    notes = look([tmp_path]).notes
    assert any(note.startswith("fewer than 20 train images of dog") for note in notes)
    assert any(note.startswith("left out 1 image in no class folder") for note in notes)
    assert "no image in empty: no class" in notes
    assert "left out 1 file of other kinds: .heic 1" in notes


WRONG = {
    "nested": ({"photos/cat": 1, "photos/dog": 1}, "too deep: .*photos holds cat, dog. Give"),
    "tasks": (
        {"pets/cat": 1, "pets/dog": 1, "cars/bus": 1, "cars/tram": 1},
        "too deep: .*cars holds bus, tram.*one question for each of the folders cars, pets",
    ),
    "one class": ({"cat": 3}, "images of one class alone, cat"),
    "flat": ({".": 3}, r"the 3 images in .* have no classes: put each into a folder"),
    "nothing": ({}, "has no images: there is no file"),
    "no train": ({"val/a": 1, "val/b": 1}, r"images in val/ and no train folder"),
    "class or split": ({"cat": 1, "dog": 1, "test": 1}, "two ways: cat, dog and test as classes"),
    "two vals": ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "two folders for the val"),
    "train without classes": ({"train": 3}, r"the images in .*train have no classes"),
}


@pytest.mark.parametrize(("counts", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_said_in_one_message(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        look([photos(tmp_path, counts)])


def test_files_that_are_no_images_here_are_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.heic").write_bytes(b"x")
    with pytest.raises(StartError, match=r"there is 1 \.heic.*Convert \.heic files to JPEG"):
        look([tmp_path])


def test_class_folders_beside_a_label_file_that_differs_are_two_readings(tmp_path: Path) -> None:
    photos(tmp_path, {"day": 2, "night": 2})
    lines = [
        f"{name}/{n}.jpg,{label}" for name in ("day", "night") for n, label in ((0, "a"), (1, "b"))
    ]
    (tmp_path / "labels.csv").write_text("file,class\n" + "\n".join(lines))
    with pytest.raises(StartError, match=r"two ways: day, night as classes, or labels\.csv"):
        look([tmp_path])


def test_two_label_files_are_two_readings_and_one_can_be_chosen(tmp_path: Path) -> None:
    photos(tmp_path, {".": 4})
    for name, labels in (("colour.csv", "rgrg"), ("shape.csv", "oovv")):
        lines = [f"{n}.jpg,{label}" for n, label in enumerate(labels)]
        (tmp_path / name).write_text("file,class\n" + "\n".join(lines))
    with pytest.raises(StartError, match=r"colour\.csv, shape\.csv both give .* --labels"):
        look([tmp_path])
    assert look([tmp_path], "shape.csv").counts == {"o": 2, "v": 2}


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"there is no .*nowhere"):
        look([tmp_path / "nowhere"])
    photos(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(StartError, match=r"--labels: there is no file gone\.csv"):
        look([tmp_path], "gone.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    with pytest.raises(StartError, match="cannot be listed"):
        look([tmp_path])
