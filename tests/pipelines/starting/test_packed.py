"""How Parquet files and tars are read: splits by names, columns by schema and values."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.starting.found import look
from pipelines.starting.reading import StartError
from tests.pipelines.starting.photos import jpeg, parquet, photos


def tar(path: Path, suffix: str) -> None:
    """Writes four samples of two classes, whose label has this suffix."""
    with tarfile.open(path, "w") as file:
        for number in range(4):
            label = json.dumps({"label": number % 2}) if suffix == "json" else str(number % 2)
            for end, content in (("jpg", jpeg(number)), (suffix, label.encode())):
                member = tarfile.TarInfo(f"{number:04d}.{end}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


NAMES = ["cat", "dog", "cat", "dog", "cat", "dog"]


@pytest.mark.parametrize("name", ["pets_val.parquet", "pets.parquet", "train.parquet"])
def test_one_file_is_one_split_to_train_on(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path / name, {"label": NAMES})
    for given in (path, tmp_path):
        found = look([given])
        assert found.reading.source == {
            "kind": "parquet",
            "train": name,
            "val": None,
            "image": "image",
            "class_column": "label",
        }
        assert found.counts == {"cat": 3, "dog": 3}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("data/train-{:05d}-of-00003.parquet", "data/validation-00000-of-00001.parquet"),
        ("train/{:04d}.parquet", "test/0000.parquet"),
        ("pets_train_{}.parquet", "pets_val.parquet"),
    ],
)
def test_splits_are_found_in_the_names_of_files_or_folders(
    tmp_path: Path, train: str, val: str
) -> None:
    for number in range(3):
        parquet(tmp_path / train.format(number), {"label": NAMES})
    parquet(tmp_path / val, {"label": NAMES})
    found = look([tmp_path])
    assert (found.train_images, found.val_images) == (18, 6)
    assert found.reading.source["val"] == val
    assert "*" in found.reading.source["train"]


def test_files_that_no_pattern_names_alone_are_listed(tmp_path: Path) -> None:
    for name in ("train_a.parquet", "train_b.parquet", "train.parquet", "valid_train.parquet"):
        parquet(tmp_path / "x" / name, {"label": NAMES})
    (tmp_path / "x/valid_train.parquet").rename(tmp_path / "x/trainval.parquet")
    chosen = [tmp_path / "x/train_a.parquet", tmp_path / "x/train.parquet"]
    with pytest.raises(StartError, match="several data sets"):
        look([tmp_path])
    with pytest.raises(StartError, match="several data sets"):
        look(chosen)


def test_files_of_several_data_sets_are_not_mixed(tmp_path: Path) -> None:
    for name in ("cifar_train", "cifar_val", "pets_train"):
        parquet(tmp_path / f"{name}.parquet", {"label": NAMES})
    with pytest.raises(StartError, match=r"several data sets: .*Give the files of one of them"):
        look([tmp_path])
    both = [tmp_path / "cifar_train.parquet", tmp_path / "cifar_val.parquet"]
    assert look(both).reading.source["val"] == "cifar_val.parquet"


def test_names_of_classes_count_before_their_numbers_and_groups_are_tasks(tmp_path: Path) -> None:
    classes = ["cat", "dog", "bus", "tram"] * 3
    columns = {
        "label": [number % 4 for number in range(12)],
        "label_name": classes,
        "group_name": ["pets", "pets", "cars", "cars"] * 3,
        "id": [f"image {number}" for number in range(12)],
        "split": ["val"] * 12,
    }
    found = look([parquet(tmp_path / "all.parquet", columns)])
    assert found.reading.source["class_column"] == "label_name"
    assert found.groups == {"cars": ("bus", "tram"), "pets": ("cat", "dog")}
    chosen = look([tmp_path / "all.parquet"], "label")
    assert chosen.counts == {"0": 3, "1": 3, "2": 3, "3": 3}


def test_hugging_faces_class_labels_are_taken(tmp_path: Path) -> None:
    features = {"answer": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    columns = {"answer": [0, 1] * 3, "place": ["here", "there"] * 3}
    path = parquet(tmp_path / "data/train-00000-of-00001.parquet", columns, features=features)
    assert look([tmp_path]).reading.source["class_column"] == "answer"
    assert look([path]).reading.source["image"] == "image"


def test_what_is_open_is_asked(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"colour": list("rgrgrg"), "form": list("oovvov")})
    with pytest.raises(StartError, match=r"several columns .* colour, form: choose one"):
        look([path])
    assert look([path], "form").counts == {"o": 3, "v": 3}
    with pytest.raises(StartError, match="no column of labels 'size'"):
        look([path], "size")
    lone = parquet(tmp_path / "b.parquet", {"id": [str(number) for number in range(6)]})
    with pytest.raises(StartError, match=r"no column of labels.*it has image, id"):
        look([lone])
    pq.write_table(pa.table({"label": NAMES}), tmp_path / "c.parquet")
    with pytest.raises(StartError, match="no column of encoded images"):
        look([tmp_path / "c.parquet"])
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(StartError, match="no readable Parquet file"):
        look([tmp_path / "d.parquet"])


def test_two_kinds_of_data_in_a_folder_are_two_readings(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 1, "dog": 1})
    parquet(tmp_path / "pets.parquet", {"label": NAMES})
    with pytest.raises(StartError, match="two ways: 1 Parquet files or class folders"):
        look([tmp_path])


def test_tars_are_found_by_split(tmp_path: Path) -> None:
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        tar(tmp_path / name, "cls")
    found = look([tmp_path])
    assert found.reading.source == {
        "kind": "webdataset",
        "train": "train-*.tar",
        "val": "val-000000.tar",
        "label": "cls",
    }
    assert (found.train_images, found.val_images, len(found.counts)) == (8, 4, 2)


@pytest.mark.parametrize(("suffix", "label"), [("txt", "txt"), ("json", "json.label")])
def test_the_label_of_a_sample_is_found(tmp_path: Path, suffix: str, label: str) -> None:
    tar(tmp_path / "pets.tar", suffix)
    assert look([tmp_path / "pets.tar"]).reading.source["label"] == label


def test_a_tar_without_labels_or_that_is_none_is_named(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", "npy")
    with pytest.raises(StartError, match="have no label: their members end in jpg, npy"):
        look([tmp_path / "a.tar"])
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(StartError, match=r"b\.tar is no readable tar file"):
        look([tmp_path / "b.tar"])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(StartError, match=r"a\.zip is no folder, Parquet file, tar or label file"):
        look([tmp_path / "a.zip"])
