"""From a prepared folder to batches: the plan of an epoch, training batches, evaluation rows.

Which rows, in what order, on which rank: plan_epoch(), pure. How they are decoded: decoding.py.
Training reads through Ray Data inside each worker: every rank runs its own small dataset of
windows, so ranks never wait for each other and batches are never short (streaming_split drops rows,
a local shuffle buffer yields short batches). local_batches() gives the same batches without Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.decoding import Batch, Decoder, concatenated
from data_prep.schema import DataConfig, DataError, Manifest, SplitInfo
from data_prep.storage import absolute, filesystem, join

if TYPE_CHECKING:
    from ray.data import Dataset

DECODE_ROWS = 64  # rows decoded between two hand-overs
PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class RowGroup:
    shard: str  # path below the folder
    index: int  # in the shard
    rows: int


@dataclass(frozen=True, eq=False)
class Window:
    """Rows read together: `picks` are positions in the groups' rows put end to end, in order."""

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
) -> list[Window]:
    """The rows one rank consumes in one epoch, in order.

    Row groups are permuted by (seed, epoch) and joined into windows of about `window_rows`, rows
    are permuted within a window. Of this order the first floor(N / global_batch) * global_batch
    rows are consumed, `global_batch` a step, whatever world_size is; the tail left out differs from
    epoch to epoch. Of a step's rows rank r takes the r-th part as they lie in their window: so the
    row groups a rank reads are hardly more than its share. DataError if there are fewer rows than a
    global batch, or if that does not divide among the ranks."""
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
    windows, waiting = [], []
    for number in random.permutation(len(groups)):
        waiting.append(groups[number])
        if sum(group.rows for group in waiting) >= window_rows:
            windows.append(tuple(waiting))
            waiting = []
    if waiting:
        windows.append(tuple(waiting))
    starts = np.cumsum([0, *(sum(group.rows for group in window) for window in windows)])
    order = np.concatenate(
        [start + random.permutation(end - start) for start, end in pairwise(starts)]
    )
    steps = order[: split.rows // global_batch * global_batch].reshape(-1, global_batch)
    places = steps.argsort(axis=1).argsort(axis=1)  # of each row among those of its step
    own = steps[places // (global_batch // world_size) == rank]
    number = np.searchsorted(starts, own, side="right") - 1  # of each row's window, never falling
    parts = np.split(own, np.searchsorted(number, np.arange(1, len(windows))))
    return [
        _window(groups, part - start)
        for groups, part, start in zip(windows, parts, starts[:-1], strict=True)
        if len(part)
    ]


def train_batches(
    folder: str,
    manifest: Manifest,
    data: DataConfig,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_cpus: float = 0.25,
) -> Iterator[Batch]:
    """Augmented training batches of exactly global_batch / world_size rows (see Decoder.decode).

    To be called in each worker; Ray must be initialised. `num_cpus` is what a reading task claims:
    workers must leave that much free. A rank runs as many tasks at once as its share of the
    cluster's CPUs, but one."""
    # Imported here and in _dataset alone: local_batches works where there is no Ray.
    from data_prep.ray_data import reading_cpus

    windows = plan_epoch(
        manifest.split("train"),
        seed=seed,
        epoch=epoch,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        window_rows=data.shuffle_window_rows,
    )
    max_tasks = max(1, int(reading_cpus()) // world_size - 1)
    decoder = Decoder.of(manifest, data, (seed, epoch))
    dataset = _dataset(folder, windows, decoder, num_cpus, max_tasks, confined=True)
    for batch in dataset.iter_batches(
        batch_size=global_batch // world_size,
        batch_format="numpy",
        prefetch_batches=PREFETCH_BATCHES,
    ):
        yield {name: np.require(values, requirements="W") for name, values in batch.items()}


def eval_rows(
    folder: str, manifest: Manifest, data: DataConfig, split: str, *, num_cpus: float = 0.25
) -> Dataset:
    """All rows of a split once, in order, centre-cropped, as a lazy Ray Dataset."""
    windows = _in_order(manifest.split(split))
    decoder = Decoder.of(manifest, data, None)
    return _dataset(folder, windows, decoder, num_cpus, None, confined=False)


def local_batches(
    folder: str,
    manifest: Manifest,
    data: DataConfig,
    *,
    global_batch: int,
    split: str = "train",
    seed: int = 0,
    epoch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 0,
) -> Iterator[Batch]:
    """The batches of train_batches, in plain Python. With `epoch` None: all rows of
    the split once, in order, centre-cropped, the last batch short.

    `threads` > 0 decode ahead of the consumer, two parts each at most."""
    info = manifest.split(split)
    if epoch is None:
        windows, augment = _in_order(info), None
    else:
        augment = (seed, epoch)
        windows = plan_epoch(
            info,
            seed=seed,
            epoch=epoch,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            window_rows=data.shuffle_window_rows,
        )
    decoder = Decoder.of(manifest, data, augment)
    parts = _parts(absolute(folder), windows, decoder, threads)
    yield from _rebatched(parts, global_batch // world_size)


def read_window(plan: pa.Table, *, folder: str, decoder: Decoder) -> Iterator[Batch]:
    """The Ray task of the reader: decoded parts of one window, given as a table by _plan_table."""
    for row in plan.to_pylist():
        groups = tuple(RowGroup(**group) for group in row["groups"])
        yield from _read(folder, Window(groups, np.array(row["picks"], np.int64)), decoder)


def _dataset(
    folder: str,
    windows: list[Window],
    decoder: Decoder,
    num_cpus: float,
    max_tasks: int | None,
    *,
    confined: bool,
) -> Dataset:
    from data_prep.ray_data import map_tables

    return map_tables(
        [_plan_table(window) for window in windows],
        read_window,
        num_cpus=num_cpus,
        max_tasks=max_tasks,
        confined=confined,
        folder=absolute(folder),
        decoder=decoder,
    )


def _plan_table(window: Window) -> pa.Table:
    groups = [
        {"shard": group.shard, "index": group.index, "rows": group.rows} for group in window.groups
    ]
    return pa.table({"groups": [groups], "picks": [window.picks]})


def _row_groups(split: SplitInfo) -> list[RowGroup]:
    return [
        RowGroup(shard.path, index, rows)
        for shard in split.shards
        for index, rows in enumerate(shard.row_group_rows)
    ]


def _window(groups: tuple[RowGroup, ...], picks: NDArray[np.int64]) -> Window:
    """The rows `picks` of some groups, without those groups that hold none of them."""
    group_of = np.repeat(np.arange(len(groups)), [group.rows for group in groups])
    used = np.unique(group_of[picks])
    places = np.cumsum(np.isin(group_of, used)) - 1  # of rows once the other groups are gone
    return Window(tuple(groups[number] for number in used), places[picks])


def _in_order(split: SplitInfo) -> list[Window]:
    return [Window((group,), np.arange(group.rows)) for group in _row_groups(split)]


def _parts(
    folder: str, windows: Sequence[Window], decoder: Decoder, threads: int
) -> Iterator[Batch]:
    """Decoded rows of all windows in order, by threads that work ahead if there are any."""
    if not threads:
        for window in windows:
            yield from _read(folder, window, decoder)
        return
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for window in windows:
                for rows in _tables(folder, window, decoder.columns):
                    waiting.append(pool.submit(decoder.decode, rows))
                    if len(waiting) > 2 * threads:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(folder: str, window: Window, decoder: Decoder) -> Iterator[Batch]:
    """Decoded rows of a window in order, DECODE_ROWS at a time."""
    yield from map(decoder.decode, _tables(folder, window, decoder.columns))


def _tables(folder: str, window: Window, columns: list[str]) -> Iterator[pa.Table]:
    """Rows of a window in order, not decoded, DECODE_ROWS at a time."""
    rows = pa.concat_tables([_row_group(folder, group, columns) for group in window.groups])
    for start in range(0, len(window.picks), DECODE_ROWS):
        yield rows.take(window.picks[start : start + DECODE_ROWS])


def _row_group(folder: str, group: RowGroup, columns: list[str]) -> pa.Table:
    """DataError, with what to do, where the shard is not as it was written."""
    path = join(folder, group.shard)
    store, inner = filesystem(path)
    try:
        with pq.ParquetFile(inner, filesystem=store, page_checksum_verification=True) as file:
            return file.read_row_group(group.index, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"shard {path} is missing or damaged ({error}): delete {folder} and run again, "
            "it is prepared anew"
        ) from None


def _rebatched(parts: Iterable[Batch], batch_rows: int) -> Iterator[Batch]:
    """Batches of exactly `batch_rows`, the last one of what is left."""
    waiting: list[Batch] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part["row_id"])
        if held >= batch_rows:
            joined, start = concatenated(waiting), 0
            while held >= batch_rows:
                yield {name: v[start : start + batch_rows] for name, v in joined.items()}
                start, held = start + batch_rows, held - batch_rows
            waiting = [{name: values[start:] for name, values in joined.items()}] if held else []
    if held:
        yield concatenated(waiting)
