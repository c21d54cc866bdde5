"""The batches of a prepared folder, with Ray and without."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import DataError
from data_prep.read import batches
from data_prep.read.batches import eval_rows, local_batches, train_batches
from data_prep.read.decoding import Batch
from data_prep.read.epoch import RowGroup, Window
from data_prep.reading import ReadingConfig


def same(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name], name)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_ray_and_plain_python_give_the_same_whole_batches(
    shapes: Any, rank: int, world_size: int
) -> None:
    settings: dict[str, Any] = {
        "seed": 2,
        "epoch": 1,
        "global_batch": 16,
        "rank": rank,
        "world_size": world_size,
    }
    one = list(train_batches(shapes.folder, shapes.manifest, shapes.data.reading, **settings))
    two = list(local_batches(shapes.folder, shapes.manifest, shapes.data.reading, **settings))
    assert len(one) == len(two) == 135 // 16
    for left, right in zip(one, two, strict=True):
        same(left, right)
        assert len(left["row_id"]) == 16 // world_size
        assert all(values.flags.writeable for values in left.values())


def test_threads_change_nothing_but_the_wait(shapes: Any) -> None:
    for epoch, split in ((0, "train"), (None, "val")):
        settings: dict[str, Any] = {"split": split, "epoch": epoch, "seed": 3, "global_batch": 16}
        alone = list(local_batches(shapes.folder, shapes.manifest, shapes.data.reading, **settings))
        ahead = local_batches(
            shapes.folder, shapes.manifest, shapes.data.reading, threads=3, **settings
        )
        for left, right in zip(alone, ahead, strict=True):
            same(left, right)


def test_a_reader_left_early_lets_its_threads_go(shapes: Any) -> None:
    before = threading.active_count()
    batches = local_batches(
        shapes.folder, shapes.manifest, shapes.data.reading, global_batch=5, threads=3
    )
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_batches_have_the_shapes_and_values_of_the_contract(shapes: Any) -> None:
    batch = next(
        local_batches(shapes.folder, shapes.manifest, shapes.data.reading, global_batch=20)
    )
    assert batch["image"].shape == (20, 3, 32, 32)
    assert batch["image"].dtype == np.uint8
    assert batch["labels"].shape == batch["task_mask"].shape == (20, 4)
    assert batch["labels"].dtype == batch["class_label"].dtype == batch["row_id"].dtype == np.int64
    assert batch["task_mask"].dtype == np.bool_
    labels, mask = batch["labels"], batch["task_mask"]
    assert ((labels[:, :3] >= 0) == mask[:, :3]).all()
    assert (labels[:, 3] == -1).all()
    regions = batch["segmentation/regions"]
    assert regions.shape == (20, 32, 32)
    assert (regions[~mask[:, 3]] == 255).all()
    assert set(np.unique(regions[mask[:, 3]])) <= {0, 1, 2, 3}


def test_evaluation_sees_every_row_once_in_order(shapes: Any) -> None:
    for split in ("train", "holdout", "val"):
        local = list(
            local_batches(
                shapes.folder, shapes.manifest, shapes.data.reading, split=split, global_batch=32
            )
        )
        rows = shapes.manifest.splits[split].rows
        assert [len(b["row_id"]) for b in local] == [32] * (rows // 32) + [rows % 32]
        dataset = eval_rows(shapes.folder, shapes.manifest, shapes.data.reading, split)
        with_ray = list(dataset.iter_batches(batch_size=32, batch_format="numpy"))
        for left, right in zip(local, with_ray, strict=True):
            same(left, right)
    ids = np.concatenate([batch["row_id"] for batch in local])
    assert (np.diff(ids) == 1).all()


def test_augmentation_depends_on_seed_epoch_and_row_alone(shapes: Any) -> None:
    by_epoch = []
    for epoch in (0, 0, 1):
        batches = local_batches(
            shapes.folder, shapes.manifest, shapes.data.reading, seed=1, epoch=epoch, global_batch=5
        )
        by_epoch.append(
            {int(i): x for b in batches for i, x in zip(b["row_id"], b["image"], strict=True)}
        )
    first, again, later = by_epoch
    assert all((first[row] == again[row]).all() for row in first)
    assert any((first[row] != later[row]).any() for row in first.keys() & later.keys())
    two_ranks = [
        batch
        for rank in (0, 1)
        for batch in local_batches(
            shapes.folder,
            shapes.manifest,
            shapes.data.reading,
            seed=1,
            epoch=0,
            global_batch=10,
            rank=rank,
            world_size=2,
        )
    ]
    for batch in two_ranks:
        for row, image in zip(batch["row_id"], batch["image"], strict=True):
            assert (first[int(row)] == image).all()


def test_without_flip_and_crop_training_rows_are_the_plain_ones(shapes: Any) -> None:
    reading = ReadingConfig(augmentation="none", flip=False)
    plain = {
        int(row): image
        for b in local_batches(shapes.folder, shapes.manifest, reading, global_batch=50)
        for row, image in zip(b["row_id"], b["image"], strict=True)
    }
    for batch in local_batches(shapes.folder, shapes.manifest, reading, epoch=0, global_batch=5):
        for row, image in zip(batch["row_id"], batch["image"], strict=True):
            assert (plain[int(row)] == image).all()


class LargeFile:
    """Stands for a Parquet file whose row groups have an image of 300 MB before a small one."""

    BYTES = 300_000_000
    ZEROS = pa.py_buffer(np.zeros(BYTES + 1, np.uint8))  # no memory until it is copied

    def __init__(self, path: str, **options: Any) -> None:
        pass

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read_row_group(self, index: int, columns: list[str]) -> pa.Table:
        offsets = pa.array([0, self.BYTES, self.BYTES + 1], pa.int32()).buffers()[1]
        images = pa.BinaryArray.from_buffers(pa.binary(), 2, [None, offsets, self.ZEROS])
        return pa.table({"image": images, "row_id": [2 * index, 2 * index + 1]})


def test_a_window_of_more_than_two_gigabytes_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.pq, "ParquetFile", LargeFile)
    groups = tuple(RowGroup("shard", index, 2) for index in range(8))
    picks = np.array([15, 1, 9, 3])
    (rows,) = batches._tables("folder", Window(groups, picks), ["image", "row_id"])
    assert rows["row_id"].to_pylist() == picks.tolist()
    assert rows["image"].to_pylist() == [b"\0"] * 4


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "gone", "a row less"])
def test_a_damaged_shard_is_named_with_what_to_do(shapes: Any, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(shapes.folder, tmp_path / "prepared")
    shard = folder / shapes.manifest.split("train").shards[0].path
    original = shard.read_bytes()
    content = bytearray(original)
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if harm == "flipped bit" else content[: len(content) // 2])
    if harm == "gone":
        shard.unlink()
    if harm == "a row less":
        shard.write_bytes(original)
        pq.write_table(pq.read_table(shard).slice(1), shard, row_group_size=10)
    with pytest.raises(DataError, match=f"{shard} is missing or damaged .* delete {folder}"):
        list(
            local_batches(
                str(folder), shapes.manifest, shapes.data.reading, split="train", global_batch=8
            )
        )


def test_a_remote_store_is_asked_again_before_a_shard_is_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"row_id": [4, 5]}), tmp_path / "shard")
    group = RowGroup("shard", 0, 2)
    failures = iter([OSError("slow down"), OSError("slow down"), None, *[OSError("gone")] * 3])
    whole = pq.ParquetFile

    def file(path: str, **options: Any) -> Any:
        if (failure := next(failures)) is not None:
            raise failure
        return whole(path, **{**options, "filesystem": None})

    monkeypatch.setattr(batches.pq, "ParquetFile", file)
    monkeypatch.setattr(batches, "filesystem", lambda path: ("a remote store", path))
    monkeypatch.setattr(batches, "REMOTE_WAITS_S", (0.0, 0.0))
    assert batches._row_group(str(tmp_path), group, ["row_id"])["row_id"].to_pylist() == [4, 5]
    with pytest.raises(DataError, match=r"missing or damaged .gone."):
        batches._row_group(str(tmp_path), group, ["row_id"])
