"""Preparing: nothing lost, nothing doubled, the same bytes every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from data_prep.prepare import shards
from data_prep.tasks import resolve_tasks

Make = Callable[..., Image.Image]


Encode = Callable[..., bytes]


def prepare(*inputs: Any, **settings: Any) -> Manifest:
    """Prepares without Ray. The fixture `shapes` is prepared with it."""
    return shards.prepare(
        *inputs, run=lambda tables, do, job: (do(table, job=job) for table in tables), **settings
    )


def rows_of(folder: str | Path, split: str) -> list[dict[str, Any]]:
    found = read_manifest(str(folder)).split(split).shards
    return [row for shard in found for row in pq.read_table(f"{folder}/{shard.path}").to_pylist()]


def poison(folder: Path, make_picture: Make, to_bytes: Encode) -> dict[str, str]:
    """Add files of every bad and odd kind; the reason expected for each bad one."""
    good = to_bytes(make_picture(99))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    levels = np.full((16, 16), 40_000, np.uint16)
    files = {
        "truncated.JPEG": good[: len(good) // 2],
        "empty.JPEG": b"",
        "text.JPEG": b"this is no image",
        "cmyk.JPEG": to_bytes(make_picture(1001).convert("CMYK")),
        "png.JPEG": to_bytes(make_picture(1002), "PNG"),
        "deep.png": to_bytes(Image.fromarray(levels), "PNG"),
        "rotated.JPEG": to_bytes(make_picture(1003, (20, 16)), exif=exif),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {"truncated.JPEG": "truncated", "empty.JPEG": "empty file", "text.JPEG": "not an image"}


def test_bad_images_are_listed_and_every_other_one_is_used(
    image_folder: Path,
    folder_data: DataConfig,
    animals: tuple[TaskConfig, ...],
    tmp_path: Path,
    make_picture: Make,
    to_bytes: Encode,
) -> None:
    expected = poison(image_folder / "train/n02085620", make_picture, to_bytes)
    manifest = prepare(
        folder_data, resolve_tasks(animals, folder_data), seed=0, output=str(tmp_path / "out")
    )
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    found = {row["id"].rpartition("/")[2]: row["reason"] for row in rejected}
    assert found == expected
    assert manifest.rejected == 3
    used = [row["source_id"] for s in manifest.splits for row in rows_of(tmp_path / "out", s)]
    files = [str(path.relative_to(image_folder)) for path in image_folder.rglob("*.*")]
    bad = {f"train/n02085620/{name}" for name in expected}
    assert sorted(used) == sorted(set(files) - bad)


def test_too_many_bad_images_stop_the_run(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    for number in (1, 0):
        (image_folder / f"val/n02085620/{number}.JPEG").write_bytes(b"")
    data = folder_data.model_copy(update={"max_bad_fraction": 0.01})
    message = (
        r"2 of 48 images are unreadable, such as val/n02085620/0\.JPEG \(empty file\): more than "
        r"data\.max_bad_fraction 0\.01"
    )
    with pytest.raises(DataError, match=message):
        prepare(data, resolve_tasks(animals, data), seed=0, output=str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out/rejected.parquet").num_rows == 2
    with pytest.raises(DataError, match="prepare the data again"):
        read_manifest(str(tmp_path / "out"))


def test_the_same_inputs_and_seed_give_the_same_bytes(
    folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    table = resolve_tasks(animals, folder_data)
    one, two, three = (
        prepare(folder_data, table, seed=seed, output=str(tmp_path / name))
        for name, seed in (("one", 5), ("two", 5), ("three", 6))
    )
    assert one == two
    assert one.fingerprint != three.fingerprint
    for split in one.splits.values():
        for shard in split.shards:
            data = (tmp_path / "two" / shard.path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard.sha256


def test_the_order_of_rows_is_mixed_and_ids_are_unique(shapes: Any) -> None:
    rows = [row for split in ("train", "holdout", "val") for row in rows_of(shapes.folder, split)]
    assert [row["row_id"] for row in rows] == list(range(len(rows)))
    names = [row["source_id"] for row in rows_of(shapes.folder, "train")]
    assert names != sorted(names)


def test_shards_are_of_similar_size_and_all_accounted_for(shapes: Any) -> None:
    train = shapes.manifest.splits["train"]
    assert len(train.shards) == 3
    assert train.rows == sum(shard.rows for shard in train.shards) == 135
    sizes = [shard.bytes for shard in train.shards]
    assert max(sizes) < 1.5 * min(sizes)
    assert not (Path(shapes.folder) / "staging").exists()


def test_a_row_group_ends_by_rows_or_by_bytes(
    folder_data: DataConfig,
    animals: tuple[TaskConfig, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = resolve_tasks(animals, folder_data)
    plain = prepare(folder_data, table, seed=0, output=str(tmp_path / "plain"))
    (shard,) = plain.splits["val"].shards
    assert shard.row_group_rows == (4, 4, 4)
    size = max(len(row["image"]) for row in rows_of(tmp_path / "plain", "val"))
    for limit, rows in ((2 * size, 2), (1, 1)):
        monkeypatch.setattr(shards, "ROW_GROUP_BYTES", limit)
        small = prepare(folder_data, table, seed=0, output=str(tmp_path / "small"))
        (shard,) = small.splits["val"].shards
        assert max(shard.row_group_rows) == rows
        assert sum(shard.row_group_rows) == 12
        assert rows_of(tmp_path / "small", "val") == rows_of(tmp_path / "plain", "val")


def test_holdout_shares_no_image_with_train_even_a_copied_one(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    for path in list((image_folder / "train").rglob("*.JPEG")):
        path.with_suffix(".copy.JPEG").write_bytes(path.read_bytes())
    data = folder_data.model_copy(update={"holdout_fraction": 0.25})
    prepare(data, resolve_tasks(animals, data), seed=0, output=str(tmp_path / "out"))
    train, held = ([r["image"] for r in rows_of(tmp_path / "out", s)] for s in ("train", "holdout"))
    assert len(held) == 18
    assert len(train) == 54
    assert not set(train) & set(held)


def test_a_class_of_two_tasks_makes_both_active(
    folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    table = resolve_tasks(animals, folder_data)
    manifest = prepare(folder_data, table, seed=0, output=str(tmp_path))
    rows = rows_of(tmp_path, "val")
    assert len(rows) == 12
    for row in rows:
        index = table.classes.index(row["source_id"].split("/")[1])
        assert row["class_label"] == index
        assert row["task_mask"] == [index < 2, True]
        assert row["labels"] == [index if index < 2 else -1, index]
    assert manifest.single_class


@pytest.mark.parametrize("unassigned", ["drop", "keep"])
def test_images_of_no_task_are_dropped_or_kept_and_counted(
    folder_data: DataConfig, tmp_path: Path, unassigned: str
) -> None:
    data = folder_data.model_copy(update={"unassigned": unassigned})
    table = resolve_tasks((TaskConfig(name="pets", classes=("n02085620", "n02123045")),), data)
    manifest = prepare(data, table, seed=0, output=str(tmp_path))
    assert manifest.unassigned == {"train": 12, "val": 4}
    rows = rows_of(tmp_path, "val")
    assert len(rows) == (8 if unassigned == "drop" else 12)
    assert manifest.single_class == (unassigned == "drop")
    lost = [row for row in rows if not any(row["task_mask"])]
    assert [row["class_label"] for row in lost] == [-1] * (len(rows) - 8)


def test_sources_mix(image_folder: Path, animals: tuple[TaskConfig, ...], tmp_path: Path) -> None:
    data = DataConfig(
        root=str(image_folder),
        image_size=16,
        sources=(
            {"kind": "image_folder"},
            {"kind": "shapes", "train_rows": 20, "val_rows": 5, "size": 16},
        ),
    )
    tasks = (
        *animals,
        TaskConfig(name="stroke", classes_from="shapes"),
        TaskConfig(name="blobs", kind="segmentation", mask="regions", labels=("0", "r", "g", "b")),
    )
    manifest = prepare(data, resolve_tasks(tasks, data), seed=0, output=str(tmp_path / "out"))
    active = [row["task_mask"] for row in rows_of(tmp_path / "out", "train")]
    _, animals_rows, stroke_rows, blobs_rows = (sum(each) for each in zip(*active, strict=True))
    assert animals_rows > 30
    assert stroke_rows > 0
    assert blobs_rows > 0
    assert [source.rows for source in manifest.sources] == [
        {"train": 36, "val": 12},
        {"train": 20, "val": 5},
    ]


def test_a_mask_value_outside_its_labels_names_the_image(tmp_path: Path) -> None:
    data = DataConfig(sources=({"kind": "shapes", "train_rows": 20, "size": 16},), image_size=16)
    table = resolve_tasks(
        (TaskConfig(name="regions", kind="segmentation", labels=("0", "r")),), data
    )
    with pytest.raises(DataError, match=r"image \w+/\d+ of source shapes: task 'regions': mask v"):
        prepare(data, table, seed=0, output=str(tmp_path))


def test_scoring_prepares_val_alone_and_reports_progress(
    folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = prepare(
        folder_data,
        resolve_tasks(animals, folder_data),
        seed=0,
        output=str(tmp_path),
        splits=("val",),
        progress=lambda *step: seen.append(step),
    )
    assert set(manifest.splits) == {"val"}
    assert seen[-1] == ("write", 12, 12)
    assert ("read", 12, 12) in seen
