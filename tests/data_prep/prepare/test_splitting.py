"""Which rows become val: chosen by content, class by class, the same for a copy of the data."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.prepare.shards import prepare
from data_prep.prepare.splitting import chosen_for_val
from data_prep.tasks import resolve_tasks
from tests.data_prep.conftest import encode, picture

INDICES = pa.list_(pa.int32())
PETS = TaskConfig(name="pets", classes="all")


def image(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def chosen(contents: list[bytes], classes: list[list[int]], fraction: float) -> list[bool]:
    """Which rows become val."""
    columns = pa.chunked_array([pa.array(contents)]), pa.chunked_array([classes], INDICES)
    return chosen_for_val(*columns, fraction).tolist()


def val_of(contents: list[bytes], classes: list[list[int]], fraction: float) -> Counter[int]:
    """How many rows of each class become val."""
    rows = zip(classes, chosen(contents, classes, fraction), strict=True)
    return Counter(own for ids, val in rows if val for own in ids)


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 1), (3, 1), (10, 2), (61, 12)])
def test_each_class_gives_its_share_and_at_least_one_of_two(size: int, expected: int) -> None:
    contents = [image(number) for number in range(2 * size)]
    classes = [[number % 2] for number in range(2 * size)]
    found = val_of(contents, classes, 0.2)
    assert [found[0], found[1]] == [expected, expected]


def test_a_large_share_leaves_every_class_an_image_to_train_on() -> None:
    contents, classes = [image(n) for n in range(6)], [[n % 3] for n in range(6)]
    assert val_of(contents, classes, 0.95) == {0: 1, 1: 1, 2: 1}


def test_an_image_of_several_classes_counts_as_its_rarest() -> None:
    classes = [[0]] * 20 + [[0, 1]] * 2 + [[]] * 5
    found = chosen([image(n) for n in range(27)], classes, 0.2)
    assert [sum(found[:20]), sum(found[20:22]), sum(found[22:])] == [4, 1, 1]


def test_equal_images_are_on_one_side_whatever_their_classes() -> None:
    contents = [image(number % 5) for number in range(10)]
    found = chosen(contents, [[0]] * 5 + [[1]] * 5, 0.4)
    assert found[:5] == found[5:]
    assert sum(found[:5]) == 2


def flat(root: Path, **counts: int) -> DataConfig:
    """One folder with class folders and no splits."""
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(encode(picture(100 * seed + number), "PNG"))
    return DataConfig(
        root=str(root),
        sources=({"kind": "image_folder", "train": ".", "val": None},),
        image_size=16,
        holdout_fraction=0.1,
        val_fraction=0.25,
    )


def prepared(data: DataConfig, output: Path, *, seed: int = 0) -> Manifest:
    return prepare(
        data,
        resolve_tasks((PETS,), data),
        seed=seed,
        output=str(output),
        run=lambda tables, do, job: (do(table, job=job) for table in tables),
    )


def ids_of(folder: Path, split: str) -> set[str]:
    files = sorted((folder / "shards").glob(f"{split}-*.parquet"))
    return {row for file in files for row in pq.read_table(file)["source_id"].to_pylist()}


def test_a_flat_folder_of_classes_is_divided_and_a_copy_alike(tmp_path: Path) -> None:
    data = flat(tmp_path / "photos", cat=12, dog=2)
    first = prepared(data, tmp_path / "one")
    assert {split: info.rows for split, info in first.splits.items()} == {
        "train": 9,
        "holdout": 1,
        "val": 4,
    }
    val = ids_of(tmp_path / "one", "val")
    assert Counter(name.split("/")[0] for name in val) == {"cat": 3, "dog": 1}
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    copy = data.model_copy(update={"root": str(tmp_path / "copy")})
    assert prepared(copy, tmp_path / "two") == first
    prepared(data, tmp_path / "three", seed=1)
    assert ids_of(tmp_path / "three", "val") == val


def test_caps_hold_for_both_sides(tmp_path: Path) -> None:
    data = flat(tmp_path / "photos", cat=20, dog=20)
    capped = data.model_copy(update={"train_rows": 12, "val_rows": 2})
    splits = prepared(capped, tmp_path / "out").splits
    assert splits["train"].rows + splits["holdout"].rows <= 12
    assert splits["val"].rows == 2


def test_a_share_beside_a_val_split_is_said_to_have_no_effect(tmp_path: Path) -> None:
    data = flat(tmp_path / "photos/train", cat=9, dog=9)
    for name in ("cat", "dog"):
        (tmp_path / f"photos/val/{name}").mkdir(parents=True)
        content = encode(picture(len(name) + ord(name[0])), "PNG")
        (tmp_path / f"photos/val/{name}/0.png").write_bytes(content)
    split = {"root": str(tmp_path / "photos"), "sources": ({"kind": "image_folder"},)}
    manifest = prepared(DataConfig(**{**data.model_dump(), **split}), tmp_path / "out")
    assert manifest.splits["val"].rows == 2
    assert any("data.val_fraction has no effect" in line for line in manifest.remarks)


def test_without_any_val_images_the_way_out_is_named(tmp_path: Path) -> None:
    data = flat(tmp_path / "photos", cat=4, dog=4)
    with pytest.raises(DataError, match=r"no val image .* or set data\.val_fraction"):
        prepared(data.model_copy(update={"val_fraction": None}), tmp_path / "out")
    folder = DataConfig(sources=({"kind": "image_folder", "train": "."},)).sources
    with pytest.raises(DataError, match=r"no val folder .* set the source's val to null and"):
        prepared(data.model_copy(update={"sources": folder}), tmp_path / "out")
    single = flat(tmp_path / "single", cat=1, dog=1)
    with pytest.raises(DataError, match="no readable val image"):
        prepared(single, tmp_path / "out")
