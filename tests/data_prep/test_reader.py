"""The plan of an epoch and the batches it gives, with Ray and without."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.decoding import Batch, Decoder, crop_box
from data_prep.reader import eval_rows, local_batches, plan_epoch, train_batches
from data_prep.schema import DataConfig, DataError, ShardInfo, SplitInfo

SPLIT = SplitInfo(
    rows=103,
    bytes=0,
    shards=tuple(
        ShardInfo(path=f"{n}", rows=rows, bytes=0, sha256="", row_group_rows=groups)
        for n, (rows, groups) in enumerate([(50, (20, 20, 10)), (53, (20, 20, 13))])
    ),
)
STARTS = {("0", 0): 0, ("0", 1): 20, ("0", 2): 40, ("1", 0): 50, ("1", 1): 70, ("1", 2): 90}


def planned(epoch: int, world_size: int, rank: int, global_batch: int = 8) -> list[int]:
    """Rows of a rank in order, numbered over the whole split."""
    windows = plan_epoch(
        SPLIT,
        seed=1,
        epoch=epoch,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        window_rows=30,
    )
    rows: list[int] = []
    for window in windows:
        joined = np.concatenate(
            [STARTS[group.shard, group.index] + np.arange(group.rows) for group in window.groups]
        )
        rows += joined[window.picks].tolist()
    return rows


def test_rows_consumed_do_not_depend_on_the_number_of_ranks() -> None:
    for epoch in range(3):
        sets = []
        for world_size in (1, 2, 4):
            parts = [planned(epoch, world_size, rank) for rank in range(world_size)]
            assert {len(part) for part in parts} == {96 // world_size}
            rows = [row for part in parts for row in part]
            assert len(set(rows)) == len(rows) == 96
            sets.append(set(rows))
        assert sets[0] == sets[1] == sets[2]


def test_a_step_has_the_same_rows_whatever_the_number_of_ranks() -> None:
    alone = np.array(planned(2, 1, 0)).reshape(-1, 8)
    for world_size in (2, 4, 8):
        parts = [
            np.array(planned(2, world_size, rank)).reshape(12, -1) for rank in range(world_size)
        ]
        together = np.concatenate(parts, axis=1)
        np.testing.assert_array_equal(np.sort(together), np.sort(alone))


def test_ranks_share_the_reading() -> None:
    split = SplitInfo(
        rows=16_384,
        bytes=0,
        shards=(ShardInfo(path="0", rows=16_384, bytes=0, sha256="", row_group_rows=(256,) * 64),),
    )
    for world_size in (1, 2, 4):
        read = sum(
            group.rows
            for rank in range(world_size)
            for window in plan_epoch(
                split,
                seed=0,
                epoch=0,
                global_batch=256,
                rank=rank,
                world_size=world_size,
                window_rows=8192,
            )
            for group in window.groups
        )
        assert read <= (1 + 0.25 * (world_size - 1)) * split.rows


def test_every_row_is_consumed_sooner_or_later() -> None:
    left_out = [set(range(103)) - set(planned(epoch, 1, 0)) for epoch in range(12)]
    assert {len(rows) for rows in left_out} == {7}
    assert len({frozenset(rows) for rows in left_out}) == 12
    assert set.intersection(*left_out) == set()


def test_epochs_differ_and_repeat_exactly() -> None:
    assert planned(0, 1, 0) == planned(0, 1, 0)
    assert planned(0, 1, 0) != planned(1, 1, 0)


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="has 103 rows, fewer than one global batch of 104"):
        planned(0, 1, 0, global_batch=104)
    with pytest.raises(DataError, match="8 does not divide among 3 workers"):
        planned(0, 3, 0)


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
    one = list(train_batches(shapes.folder, shapes.manifest, shapes.data, **settings))
    two = list(local_batches(shapes.folder, shapes.manifest, shapes.data, **settings))
    assert len(one) == len(two) == 135 // 16
    for left, right in zip(one, two, strict=True):
        same(left, right)
        assert len(left["row_id"]) == 16 // world_size
        assert all(values.flags.writeable for values in left.values())


def test_threads_change_nothing_but_the_wait(shapes: Any) -> None:
    for epoch, split in ((0, "train"), (None, "val")):
        settings: dict[str, Any] = {"split": split, "epoch": epoch, "seed": 3, "global_batch": 16}
        alone = list(local_batches(shapes.folder, shapes.manifest, shapes.data, **settings))
        ahead = local_batches(shapes.folder, shapes.manifest, shapes.data, threads=3, **settings)
        for left, right in zip(alone, ahead, strict=True):
            same(left, right)


def test_a_reader_left_early_lets_its_threads_go(shapes: Any) -> None:
    before = threading.active_count()
    batches = local_batches(shapes.folder, shapes.manifest, shapes.data, global_batch=5, threads=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_batches_have_the_shapes_and_values_of_the_contract(shapes: Any) -> None:
    batch = next(local_batches(shapes.folder, shapes.manifest, shapes.data, global_batch=20))
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
            local_batches(shapes.folder, shapes.manifest, shapes.data, split=split, global_batch=32)
        )
        rows = shapes.manifest.splits[split].rows
        assert [len(b["row_id"]) for b in local] == [32] * (rows // 32) + [rows % 32]
        dataset = eval_rows(shapes.folder, shapes.manifest, shapes.data, split)
        with_ray = list(dataset.iter_batches(batch_size=32, batch_format="numpy"))
        for left, right in zip(local, with_ray, strict=True):
            same(left, right)
    ids = np.concatenate([batch["row_id"] for batch in local])
    assert (np.diff(ids) == 1).all()


def decoder(data: DataConfig, size: tuple[int, int], epoch: int | None = 0) -> Decoder:
    return Decoder(size, 1, ("m",), data, None if epoch is None else (0, epoch))


@pytest.mark.parametrize("augmentation", ["none", "padded_crop", "random_resized_crop"])
@pytest.mark.parametrize("stored", [(24, 16), (16, 24), (12, 40)])
def test_an_image_and_its_mask_are_cut_alike(augmentation: str, stored: tuple[int, int]) -> None:
    data = DataConfig(sources=({"kind": "shapes"},), image_size=16, augmentation=augmentation)
    left = np.zeros((stored[1], stored[0]), np.uint8)
    left[:, : stored[0] // 3] = 200
    image = Image.merge("RGB", [Image.fromarray(left)] * 3)
    for row_id in range(8):
        pixels, masks = decoder(data, (16, 16))._view(image, {"m": Image.fromarray(left)}, row_id)
        assert pixels.shape == (16, 16, 3)
        agree = (pixels[..., 0] > 100) == (masks["m"] > 100)
        assert agree.mean() > 0.9


def test_augmentation_depends_on_seed_epoch_and_row_alone(shapes: Any) -> None:
    by_epoch = []
    for epoch in (0, 0, 1):
        batches = local_batches(
            shapes.folder, shapes.manifest, shapes.data, seed=1, epoch=epoch, global_batch=5
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
            shapes.data,
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


def test_random_crops_keep_the_asked_area_and_stay_inside() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(random, (40, 30), 0.35)
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 30
        assert (right - left) * (bottom - top) >= 0.35 * 40 * 30 - 1e-6


def test_without_flip_and_crop_training_rows_are_the_plain_ones(shapes: Any) -> None:
    data = shapes.data.model_copy(update={"augmentation": "none", "flip": False})
    plain = {
        int(row): image
        for b in local_batches(shapes.folder, shapes.manifest, data, global_batch=50)
        for row, image in zip(b["row_id"], b["image"], strict=True)
    }
    for batch in local_batches(shapes.folder, shapes.manifest, data, epoch=0, global_batch=5):
        for row, image in zip(batch["row_id"], batch["image"], strict=True):
            assert (plain[int(row)] == image).all()


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "gone"])
def test_a_damaged_shard_is_named_with_what_to_do(shapes: Any, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(shapes.folder, tmp_path / "prepared")
    shard = folder / shapes.manifest.split("train").shards[0].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if harm == "flipped bit" else content[: len(content) // 2])
    if harm == "gone":
        shard.unlink()
    with pytest.raises(DataError, match=f"{shard} is missing or damaged .* delete {folder}"):
        list(
            local_batches(str(folder), shapes.manifest, shapes.data, split="train", global_batch=8)
        )
