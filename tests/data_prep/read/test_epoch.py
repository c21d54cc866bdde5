"""The plan of an epoch: which rows, in which order, on which rank."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.manifest import ShardInfo, SplitInfo
from data_prep.read.epoch import Window, divided, plan_epoch, plan_in_order

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
    return rows_of(windows)


def rows_of(windows: list[Window]) -> list[int]:
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


def test_a_window_ends_by_rows_or_by_bytes_alike_for_every_number_of_ranks() -> None:
    shards = tuple(shard.model_copy(update={"bytes": 10 * shard.rows}) for shard in SPLIT.shards)
    split = SPLIT.model_copy(update={"shards": shards})

    def windows(window_bytes: int, world_size: int = 1, rank: int = 0) -> list[Window]:
        return plan_epoch(
            split,
            seed=1,
            epoch=0,
            global_batch=8,
            rank=rank,
            world_size=world_size,
            window_rows=30,
            window_bytes=window_bytes,
        )

    assert planned(0, 1, 0) == rows_of(windows(1000)) == rows_of(windows(10**9))
    for limit in (250, 330):
        cut = windows(limit)
        assert all(sum(10 * group.rows for group in window.groups) <= limit for window in cut)
        assert len(set(rows_of(cut))) == 96
        steps = np.array(rows_of(cut)).reshape(-1, 8)
        halves = [np.array(rows_of(windows(limit, 2, rank))).reshape(-1, 4) for rank in (0, 1)]
        np.testing.assert_array_equal(np.sort(np.hstack(halves)), np.sort(steps))
    assert [len(window.groups) for window in windows(1)] == [1] * len(windows(1))


def test_every_row_is_consumed_sooner_or_later() -> None:
    left_out = [set(range(103)) - set(planned(epoch, 1, 0)) for epoch in range(12)]
    assert {len(rows) for rows in left_out} == {7}
    assert len({frozenset(rows) for rows in left_out}) == 12
    assert set.intersection(*left_out) == set()


def test_epochs_differ_and_repeat_exactly() -> None:
    assert planned(0, 1, 0) == planned(0, 1, 0)
    assert planned(0, 1, 0) != planned(1, 1, 0)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_parts_of_windows_have_the_rows_of_the_windows_in_order(parts: int) -> None:
    windows = plan_epoch(
        SPLIT, seed=1, epoch=0, global_batch=8, rank=0, world_size=1, window_rows=30
    )
    found = divided(windows, parts, least_rows=4)
    assert rows_of(found) == rows_of(windows)
    sizes = [len(window.picks) for window in windows]
    assert len(found) == sum(max(1, min(parts, size // 4)) for size in sizes)
    assert min(len(part.picks) for part in found) >= min(4, *sizes)
    for part in found:
        ends = np.cumsum([group.rows for group in part.groups])
        assert set(np.searchsorted(ends, part.picks, side="right")) == set(range(len(ends)))


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="has 103 rows, fewer than one global batch of 104"):
        planned(0, 1, 0, global_batch=104)
    with pytest.raises(DataError, match="8 does not divide among 3 workers"):
        planned(0, 3, 0)


def test_a_plan_in_order_has_every_row_once() -> None:
    rows = [
        STARTS[group.shard, group.index] + pick
        for window in plan_in_order(SPLIT)
        for group in window.groups
        for pick in window.picks.tolist()
    ]
    assert rows == list(range(103))


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_in_order_are_disjoint_and_together_all_rows_though_some_are_empty(
    world_size: int,
) -> None:
    for rows in range(1, 61):
        groups = tuple(min(7, rows - start) for start in range(0, rows, 7))
        shard = ShardInfo(path="0", rows=rows, bytes=0, sha256="", row_group_rows=groups)
        split = SplitInfo(rows=rows, bytes=0, shards=(shard,))
        shares = []
        for rank in range(world_size):
            windows = plan_in_order(split, rank=rank, world_size=world_size)
            assert all(len(window.picks) for window in windows)
            shares.append(
                [7 * group.index + pick for w in windows for group in w.groups for pick in w.picks]
            )
        assert [row for share in shares for row in share] == list(range(rows))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
