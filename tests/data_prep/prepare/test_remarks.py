"""What a prepared set lacks or holds twice is said; what decides over all images is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from data_prep.prepare.remarks import listing_remarks
from data_prep.prepare.shards import prepare
from data_prep.tasks import resolve_tasks
from tests.data_prep.conftest import encode, picture
from tests.data_prep.rows import write_parquet

PETS = TaskConfig(name="pets", classes=("cat", "dog"))
VEHICLES = TaskConfig(name="vehicles", classes=("car", "bus"))


def prepared(data: DataConfig, *tasks: TaskConfig, output: Path) -> Manifest:
    return prepare(
        data,
        resolve_tasks(tasks, data),
        seed=0,
        output=str(output),
        run=lambda tables, do, job: (do(table, job=job) for table in tables),
    )


def folders(root: Path, **counts: int) -> DataConfig:
    """Folders of so many images, `train_cat=3`, each image once; a third of train is held back."""
    seed = 0
    for place, count in counts.items():
        folder = root.joinpath(*place.split("_"))
        folder.mkdir(parents=True)
        for number in range(count):
            seed += 1
            (folder / f"{number}.png").write_bytes(encode(picture(seed), "PNG"))
    return DataConfig(
        root=str(root), sources=({"kind": "image_folder"},), image_size=16, holdout_fraction=0.34
    )


def labelled(root: Path, labels: list[list[str]]) -> DataConfig:
    """A Parquet file of images with these classes, for train; two of cat for val."""
    for split, rows in (("train", labels), ("val", [["cat"]] * 2)):
        images = [encode(picture(100 * len(split) + n), "PNG") for n in range(len(rows))]
        write_parquet(root / f"{split}.parquet", image=images, label=rows)
    source: dict[str, Any] = {"kind": "parquet", "class_column": "label"}
    files = {"train": "train.parquet", "val": "val.parquet"}
    return DataConfig(root=str(root), sources=({**source, **files},), image_size=16)


def test_a_set_that_lacks_nothing_has_no_remark(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=9, train_dog=9, val_cat=2, val_dog=2)
    manifest = prepared(data, PETS, output=tmp_path / "out")
    assert manifest.remarks == ()
    assert manifest.single_class


def test_classes_without_images_are_named_by_split_with_a_hint(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=9, train_dgo=9, val_cat=2)
    manifest = prepared(data, PETS, output=tmp_path / "out")
    assert manifest.remarks == (
        "train: left out 9 images of no task, with the classes dgo (9)",
        "no training image of 1 of 2 classes (dog): nothing is learned about them; "
        "did you mean 'dgo'?",
        "no val image of 1 of 2 classes (dog): no figure covers them; did you mean 'dgo'?",
    )
    assert manifest.unassigned == {"train": 9, "val": 0}
    assert read_manifest(str(tmp_path / "out")) == manifest


def test_many_absent_classes_are_no_slip_of_the_pen(tmp_path: Path) -> None:
    data = folders(tmp_path, train_n02085620=9, train_n02085782=9, val_n02085620=2)
    dogs = TaskConfig(name="dogs", indices=("151-160",))
    said = listing_remarks(data, resolve_tasks((dogs,), data))
    absent = [text for text in said if "of 10 classes" in text]
    assert len(absent) == 2
    assert not any("did you mean" in text for text in said)


def test_a_task_without_held_back_or_val_image_is_named(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=40, train_dog=40, train_car=1, train_bus=1, val_cat=1)
    data = data.model_copy(update={"holdout_fraction": 0.05})
    said = prepared(data, PETS, VEHICLES, output=tmp_path / "out").remarks
    assert said == (
        "no held-back image of task vehicles: epochs and thresholds are chosen without them "
        "(data.holdout_fraction)",
        "no val image of task vehicles: no figure covers them",
        "no val image of 1 of 2 classes (dog): no figure covers them",
    )


@pytest.mark.parametrize("share", [0.01, 0.0])
def test_one_unreadable_image_of_a_small_set_is_named_and_left_out(
    tmp_path: Path, share: float
) -> None:
    data = folders(tmp_path, train_cat=9, train_dog=9, val_cat=2, val_dog=2)
    data = data.model_copy(update={"max_bad_fraction": share})
    (tmp_path / "train/cat/0.png").write_bytes(b"")
    if share:
        assert prepared(data, PETS, output=tmp_path / "out").remarks == (
            "left out 1 unreadable image, such as train/cat/0.png (empty file): "
            "rejected.parquet lists all",
        )
    else:
        with pytest.raises(DataError, match=r"1 of 22 images .*fraction 0\."):
            prepared(data, PETS, output=tmp_path / "out")


def test_a_listing_says_what_there_is_and_what_is_missing(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=9, train_dgo=2, train_car=3, val_cat=2)
    (tmp_path / "train/cat/more.jfif").write_bytes(b"")
    (tmp_path / "train/loose.png").write_bytes(b"")
    assert listing_remarks(data, resolve_tasks((PETS, VEHICLES), data)) == [
        "train: 12 images (cat 9, car 3)",
        "val: 2 images (cat 2)",
        "train: left out 1 file of other kinds: .jfif 1",
        "train: left out 1 image in no class folder, such as loose.png",
        "train: left out 2 images of no task, with the classes dgo (2)",
        "no training image of 2 of 4 classes (dog, bus): nothing is learned about them; "
        "did you mean 'dgo'?",
        "no val image of task vehicles: no figure covers them",
        "no val image of 1 of 2 classes (dog): no figure covers them; did you mean 'dgo'?",
    ]


def test_a_listing_without_val_says_which_share_becomes_it(tmp_path: Path) -> None:
    data = folders(tmp_path, cat=4, dog=4)
    source = ({"kind": "image_folder", "train": ".", "val": None},)
    data = DataConfig(root=data.root, sources=source, val_fraction=0.2)
    assert listing_remarks(data, resolve_tasks((PETS,), data)) == [
        "train: 8 images (cat 4, dog 4)",
        "val: about 20% of them (data.val_fraction)",
    ]


def test_one_picture_in_two_classes_and_in_train_and_val_is_counted(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=9, train_dog=9, val_cat=2, val_dog=2)
    for number in range(3):
        copied = (tmp_path / f"train/cat/{number}.png").read_bytes()
        (tmp_path / f"val/cat/copy{number}.png").write_bytes(copied)
        (tmp_path / f"train/dog/copy{number}.png").write_bytes(copied)
    said = prepared(data, PETS, output=tmp_path / "out").remarks
    assert len(said) == 2
    assert said[0].startswith(
        "3 of 7 val images are training images too, such as val/cat/copy0.png"
    )
    assert said[1].startswith("3 pictures stand under different classes, such as ")
    assert " as dog" in said[1]
    assert " as cat" in said[1]


@pytest.mark.parametrize(
    ("setting", "expected", "end"),
    [
        ("auto", False, "or to false to agree"),
        (True, True, "they have no part in the joint decision"),
        (False, False, None),
    ],
)
def test_one_image_of_two_classes_decides_only_with_a_word(
    tmp_path: Path, setting: Any, expected: bool, end: str | None
) -> None:
    data = labelled(tmp_path, [["cat"], ["dog"]] * 20 + [["cat", "dog"]])
    data = DataConfig.model_validate({**data.model_dump(), "single_class": setting})
    manifest = prepared(data, PETS, output=tmp_path / "out")
    assert manifest.single_class == expected
    said = [line for line in manifest.remarks if "or several" in line]
    assert len(said) == (end is not None)
    for line in said:
        assert line.startswith(
            "1 of 43 images carry no class of the tasks or several, such as train.parquet:40"
        )
        assert line.endswith(str(end))


def test_many_images_of_several_classes_need_no_word(tmp_path: Path) -> None:
    data = labelled(tmp_path, [["cat"], ["dog"], ["cat", "dog"]] * 10)
    manifest = prepared(data, PETS, output=tmp_path / "out")
    assert not manifest.single_class
    assert not [line for line in manifest.remarks if "or several" in line]


def test_single_class_without_any_such_image_is_refused(tmp_path: Path) -> None:
    data = labelled(tmp_path, [["cat", "dog"]] * 10)
    data = DataConfig.model_validate({**data.model_dump(), "single_class": True})
    with pytest.raises(DataError, match=r"data\.single_class is true, but 10 of 12 images"):
        prepared(data, PETS, output=tmp_path / "out")


def test_a_manifest_without_remarks_is_still_read(tmp_path: Path) -> None:
    data = folders(tmp_path, train_cat=9, train_dog=9, val_cat=2, val_dog=2)
    manifest = prepared(data, PETS, output=tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    record = json.loads(path.read_text())
    del record["remarks"]
    path.write_text(json.dumps(record))
    assert read_manifest(str(tmp_path / "out")) == manifest
