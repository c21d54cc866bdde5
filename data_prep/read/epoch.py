"""Plans which rows an epoch reads and in which order, from the manifest alone. Reads no files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.manifest import SplitInfo

WINDOW_BYTES = 512 * 2**20  # a reading task holds a window in memory


@dataclass(frozen=True)
class RowGroup:
    """A part of a shard that is read at once."""

    shard: str  # path below the folder
    index: int  # in the shard
    rows: int


@dataclass(frozen=True, eq=False)
class Window:
    """Rows read together. `picks` are positions, in order, in the groups' rows put end to end."""

    groups: tuple[RowGroup, ...]
    picks: NDArray[np.int64]


def plan_epoch(
    split: SplitInfo,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int,
    world_size: int,
    window_rows: int,
    window_bytes: int = WINDOW_BYTES,
) -> list[Window]:
    """Plans the rows one rank consumes in one epoch, in order.

    Row groups are permuted by (seed, epoch) and joined into windows of about `window_rows`, or of
    fewer rows where they would have more than `window_bytes`; rows are permuted within a window.
    Of this order the first floor(N / global_batch) * global_batch rows are consumed, `global_batch`
    a step, whatever `world_size` is. The rows left out differ from epoch to epoch. Rank r takes the
    r-th part of a step's rows as they lie in their window, so the ranks hardly read a row group
    twice. Raises DataError where there are fewer rows than a global batch, or where a global batch
    does not divide among the ranks.
    """
    if global_batch % world_size:
        raise DataError(
            f"a global batch of {global_batch} does not divide among {world_size} workers; "
            f"use a multiple of {world_size}"
        )
    if split.rows < global_batch:
        raise DataError(
            f"the split has {split.rows} rows, fewer than one global batch of {global_batch}; "
            "use a smaller batch or more images"
        )
    groups = _row_groups(split)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(groups)).tolist()
    windows = _joined([groups[n] for n in order], _bytes_of(split), window_rows, window_bytes)
    starts = np.cumsum([0, *(sum(group.rows for group in window) for window in windows)])
    rows = np.concatenate(
        [start + random.permutation(end - start) for start, end in pairwise(starts)]
    )
    steps = rows[: split.rows // global_batch * global_batch].reshape(-1, global_batch)
    places = steps.argsort(axis=1).argsort(axis=1)  # of each row among those of its step
    own = steps[places // (global_batch // world_size) == rank]
    number = np.searchsorted(starts, own, side="right") - 1  # of each row's window, never falling
    parts = np.split(own, np.searchsorted(number, np.arange(1, len(windows))))
    return [
        _window(groups, part - start)
        for groups, part, start in zip(windows, parts, starts[:-1], strict=True)
        if len(part)
    ]


def plan_in_order(split: SplitInfo, *, rank: int = 0, world_size: int = 1) -> list[Window]:
    """Plans one rank's rows of a split once, in order, a window for each row group it needs.

    The ranks' shares lie one behind the other and differ by one row at most; with fewer rows than
    ranks some are empty.
    """
    start, stop = (split.rows * each // world_size for each in (rank, rank + 1))
    windows, first = [], 0
    for group in _row_groups(split):
        picks = np.arange(max(start - first, 0), min(stop - first, group.rows))
        if len(picks):
            windows.append(Window((group,), picks))
        first += group.rows
    return windows


def divided(windows: Iterable[Window], parts: int, least_rows: int) -> list[Window]:
    """Cuts each window into up to `parts` windows of at least `least_rows` rows, in order.

    The order of the rows stays. A part names the row groups alone that hold its rows.
    """
    return [
        _window(window.groups, picks)
        for window in windows
        for picks in np.array_split(
            window.picks, max(1, min(parts, len(window.picks) // least_rows))
        )
    ]


def row_numbers(split: SplitInfo, windows: Iterable[Window]) -> Iterator[NDArray[np.int64]]:
    """Yields the places of each window's rows among all rows of the split."""
    groups = _row_groups(split)
    starts = np.cumsum([0, *(group.rows for group in groups)]).tolist()
    start_of = dict(zip(groups, starts[:-1], strict=True))
    for window in windows:
        rows = [start_of[group] + np.arange(group.rows) for group in window.groups]
        yield np.concatenate(rows)[window.picks]


def _row_groups(split: SplitInfo) -> list[RowGroup]:
    return [
        RowGroup(shard.path, index, rows)
        for shard in split.shards
        for index, rows in enumerate(shard.row_group_rows)
    ]


def _bytes_of(split: SplitInfo) -> dict[str, float]:
    """Returns the bytes of a row by shard, on average."""
    return {shard.path: shard.bytes / max(1, shard.rows) for shard in split.shards}


def _joined(
    groups: list[RowGroup], row_bytes: dict[str, float], window_rows: int, window_bytes: int
) -> list[tuple[RowGroup, ...]]:
    """Joins row groups, in order, until they hold enough rows or the next would be too much."""
    windows: list[tuple[RowGroup, ...]] = []
    waiting: list[RowGroup] = []
    rows, size = 0, 0.0
    for group in groups:
        own = group.rows * row_bytes[group.shard]
        if waiting and (rows >= window_rows or size + own > window_bytes):
            windows.append(tuple(waiting))
            waiting, rows, size = [], 0, 0.0
        waiting.append(group)
        rows, size = rows + group.rows, size + own
    return [*windows, tuple(waiting)]


def _window(groups: tuple[RowGroup, ...], picks: NDArray[np.int64]) -> Window:
    """Returns a window of the rows `picks`, without the groups that hold none of them."""
    group_of = np.repeat(np.arange(len(groups)), [group.rows for group in groups])
    used = np.unique(group_of[picks])
    places = np.cumsum(np.isin(group_of, used)) - 1  # of rows once the other groups are gone
    return Window(tuple(groups[number] for number in used), places[picks])
