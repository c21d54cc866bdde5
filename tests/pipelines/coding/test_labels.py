"""Images are named in order by batches, and the label file is one that `image_folder` reads."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.sources.folder import ImageFolder
from mantis_core.device.files import Failure
from mantis_core.networks.preprocessing import normalise
from pipelines.coding.labels import Classifier, LabelFile, Named, find_images, name_each
from tests.data_prep.rows import listed

CLASSES = ("dark", "light")
GREY = normalise(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8))


def by_brightness(x: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) to logits (B, 2)."""
    light = (x - GREY).mean(dim=(1, 2, 3))
    return torch.stack([-light, light], dim=1)


CLASSIFIER = Classifier(by_brightness, CLASSES, (8, 8), 8, torch.device("cpu"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in two folders, the dark ones named so, a damaged one and a text."""
    folder = tmp_path / "photos"
    for name in ("a/dark, small.png", "a/light.png", "b c/dark.png", "light.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), "black" if "dark" in name else "white").save(path)
    (folder / "a/notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_every_image_gets_its_class_whatever_the_batch(photos: Path, batch_size: int) -> None:
    images = find_images(str(photos))
    assert dict(images.others) == {".txt": 1}
    found = list(name_each(CLASSIFIER, str(photos), images.files, batch_size=batch_size))
    named = [(each.file, each.class_id) for each in found if isinstance(each, Named)]
    assert named == [
        ("a/dark, small.png", "dark"),
        ("a/light.png", "light"),
        ("b c/dark.png", "dark"),
        ("light.png", "light"),
    ]
    assert all(0.5 < each.probability <= 1 for each in found if isinstance(each, Named))


def test_what_cannot_be_read_is_a_failure_and_the_rest_goes_on(photos: Path) -> None:
    (photos / "a/b.jpg").write_bytes(b"no image")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    Image.new("RGB", (8, 8)).save(photos / os.fsdecode(b"caf\xe9.png"))
    found = list(name_each(CLASSIFIER, str(photos), find_images(str(photos)).files))
    failures = [each.reason for each in found if isinstance(each, Failure)]
    assert len(found) - len(failures) == 4
    assert [text.removeprefix(f"{photos}/").removeprefix("cannot read ") for text in failures] == [
        "a/b.jpg is no readable image: not an image",
        "caf\\xe9.png has a name that is not UTF-8; rename it",
        f"{photos}/gone.png: No such file or directory",
    ]


def test_the_source_image_folder_reads_the_label_file(photos: Path, tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    file = LabelFile(text)
    for each in name_each(CLASSIFIER, str(photos), find_images(str(photos)).files):
        assert isinstance(each, Named)
        file.add(each)
    assert dict(file.classes) == {"dark": 2, "light": 2}
    lines = text.getvalue().splitlines()
    assert lines[0] == "file,class,probability"
    assert lines[1].startswith('"a/dark, small.png",dark,0.')
    assert len(lines[1].rpartition(".")[2]) == 4
    (tmp_path / "labels.csv").write_text(text.getvalue())
    for split in ("train", "val"):
        own = {split: "photos", f"{split}_labels": "labels.csv"}
        source = ImageFolder(path=str(tmp_path), **{"train": None, "val": None, **own})
        assert listed(source, tmp_path, split) == [
            ("photos/a/dark, small.png", ["dark"]),
            ("photos/a/light.png", ["light"]),
            ("photos/b c/dark.png", ["dark"]),
            ("photos/light.png", ["light"]),
        ]
