"""Reads a prepared folder in batches, with Ray Data or in this process.

epoch.py plans which rows a rank reads and in which order; decoding.py turns them into arrays.
Training reads through Ray Data inside each worker. Every rank runs its own small dataset of
windows: so ranks never wait for each other, and batches are never short (streaming_split drops
rows, a local shuffle buffer yields short batches). local_batches() gives the same batches without
Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.read.decoded import Chunk, DecodedRows, decoded_rows
from data_prep.read.decoding import Batch, Decoder, concatenated
from data_prep.read.epoch import (
    RowGroup,
    Window,
    divided,
    plan_epoch,
    plan_in_order,
    row_numbers,
)
from data_prep.reading import ReadingConfig
from data_prep.storage import absolute, filesystem, in_threads, is_uri, join

if TYPE_CHECKING:
    from ray.data import Dataset

Item = TypeVar("Item")
Result = TypeVar("Result")
DECODE_ROWS = 64  # rows decoded at once
PREFETCH_BATCHES = 4
PARTS_PER_TASK = 4
"""Parts of an epoch for each task that runs at once, so that none waits long for the last one."""
LOCAL_PARTS, REMOTE_PARTS = 8, 2
"""Most parts of a window. Each reads the window's row groups, which costs less than decoding."""
REMOTE_WAITS_S = (1.0, 5.0)  # before a row group of a remote store is read again


def train_batches(
    folder: str,
    manifest: Manifest,
    reading: ReadingConfig,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_cpus: float = 0.25,
) -> Iterator[Batch]:
    """Yields augmented batches of exactly global_batch / world_size rows (see Decoder.decode).

    Each worker calls it for its rank; Ray must be initialised. A reading task claims `num_cpus`,
    which workers must leave free. A rank runs as many at once as its share of the cluster's CPUs:
    tasks yield to training, since Ray runs them at a lower priority.
    """
    # Imported here and in _dataset alone: local_batches works without Ray.
    from data_prep.ray_data import reading_cpus

    windows = plan_epoch(
        manifest.split("train"),
        seed=seed,
        epoch=epoch,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        window_rows=reading.shuffle_window_rows,
    )
    max_tasks = max(1, int(reading_cpus()) // world_size)
    most_parts = REMOTE_PARTS if is_uri(folder) else LOCAL_PARTS
    parts = min(most_parts, math.ceil(PARTS_PER_TASK * max_tasks / len(windows)))
    windows = divided(windows, parts, DECODE_ROWS)
    decoder = Decoder.of(manifest, reading, (seed, epoch))
    at_once = min(max_tasks, len(windows))  # Ray warns of more
    dataset = _dataset(folder, windows, decoder, num_cpus, at_once, confined=True)
    for batch in dataset.iter_batches(
        batch_size=global_batch // world_size,
        batch_format="numpy",
        prefetch_batches=PREFETCH_BATCHES,
    ):
        yield {name: np.require(values, requirements="W") for name, values in batch.items()}


def eval_rows(
    folder: str, manifest: Manifest, reading: ReadingConfig, split: str, *, num_cpus: float = 0.25
) -> Dataset:
    """Returns all rows of a split once, in order, cut to their centre, as a lazy Ray Dataset."""
    windows = plan_in_order(manifest.split(split))
    decoder = Decoder.of(manifest, reading, None)
    return _dataset(folder, windows, decoder, num_cpus, None, confined=False)


def local_batches(
    folder: str,
    manifest: Manifest,
    reading: ReadingConfig,
    *,
    global_batch: int,
    split: str = "train",
    seed: int = 0,
    epoch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 0,
    cache: Path | None = None,
) -> Iterator[Batch]:
    """Yields the batches of train_batches, or those of an evaluation, without Ray.

    With `epoch` None it reads the rank's rows of the split once, in order, cut to their centre; the
    last batch may be short, and a rank may have no rows. `threads` decode ahead of the consumer,
    two parts each at most; with 0 this thread decodes. With `cache`, a folder on a local disk, rows
    are decoded once and kept there (see decoded.py).
    """
    info = manifest.split(split)
    if epoch is None:
        windows, augment = plan_in_order(info, rank=rank, world_size=world_size), None
    else:
        augment = (seed, epoch)
        windows = plan_epoch(
            info,
            seed=seed,
            epoch=epoch,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            window_rows=reading.shuffle_window_rows,
        )
    decoder = Decoder.of(manifest, reading, augment)
    kept = None
    if cache is not None:
        kept = kept_rows(cache, folder, manifest, reading, split=split, threads=threads)
    if kept is None:
        parts = _mapped(decoder.decode, _all_tables(folder, windows, decoder), threads)
    else:
        numbers = (
            rows[start : start + DECODE_ROWS]
            for rows in row_numbers(info, windows)
            for start in range(0, len(rows), DECODE_ROWS)
        )
        parts = _mapped(partial(kept.decode, decoder=decoder), numbers, threads)
    yield from _rebatched(parts, global_batch // world_size)


def read_window(plan: pa.Table, *, folder: str, decoder: Decoder) -> Iterator[Batch]:
    """Decodes one window, part by part, in a Ray task; `plan` is made by _plan_table."""
    for row in plan.to_pylist():
        groups = tuple(RowGroup(**group) for group in row["groups"])
        window = Window(groups, np.array(row["picks"], np.int64))
        yield from map(decoder.decode, _tables(folder, window, decoder.columns))


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


def kept_rows(
    cache: Path,
    folder: str,
    manifest: Manifest,
    reading: ReadingConfig,
    *,
    split: str,
    threads: int = 0,
) -> DecodedRows | None:
    """Returns the decoded rows of a split, which the first call on this machine makes.

    None where they have no room; see `decoded_rows`.
    """
    info, (height, width) = manifest.split(split), manifest.image_size
    decoder = Decoder.of(manifest, reading, None)

    def chunks(function: Callable[[pa.Table], Chunk]) -> Iterator[Chunk]:
        return _mapped(function, _all_tables(folder, plan_in_order(info), decoder), threads)

    return decoded_rows(
        cache / f"{manifest.fingerprint[:32]}-{split}-{height}x{width}",
        reading.cache_gib * 2**30,
        info.rows,
        decoder,
        chunks,
    )


def _mapped(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yields function(item) of all items in order; threads, if any, work ahead."""
    return in_threads(function, items, threads) if threads else map(function, items)


def _all_tables(folder: str, windows: Iterable[Window], decoder: Decoder) -> Iterator[pa.Table]:
    """Yields the rows of all windows as `_tables` does."""
    for window in windows:
        yield from _tables(absolute(folder), window, decoder.columns)


def _tables(folder: str, window: Window, columns: list[str]) -> Iterator[pa.Table]:
    """Yields the rows of a window in order, not decoded, DECODE_ROWS at a time.

    Of each row group it keeps the window's own rows alone, in the order of the window. So the rows
    of a group that come next always lie side by side.
    """
    starts = np.cumsum([0, *(group.rows for group in window.groups)])
    number = np.searchsorted(starts, window.picks, side="right") - 1
    waiting = [
        _row_group(folder, group, columns).take(window.picks[number == n] - starts[n])
        for n, group in enumerate(window.groups)
    ]
    for start in range(0, len(number), DECODE_ROWS):
        chunk = number[start : start + DECODE_ROWS]
        used = np.unique(chunk)
        places = [np.flatnonzero(chunk == n) for n in used]
        rows = [waiting[n].slice(0, len(own)) for n, own in zip(used, places, strict=True)]
        for n, own in zip(used, places, strict=True):
            waiting[n] = waiting[n].slice(len(own))
        yield pa.concat_tables(rows).take(np.argsort(np.concatenate(places)))


def _row_group(folder: str, group: RowGroup, columns: list[str]) -> pa.Table:
    """Reads a row group. Raises DataError where the shard is not as it was written.

    A remote store is asked again: it may not answer for a moment, and a DataError ends a training.
    """
    path = join(folder, group.shard)
    store, inner = filesystem(path)
    is_remote = not isinstance(store, fs.LocalFileSystem)
    waits = REMOTE_WAITS_S if is_remote else ()
    for wait_s in (*waits, None):
        try:
            with pq.ParquetFile(
                inner,
                filesystem=store,
                page_checksum_verification=True,
                pre_buffer=is_remote,  # neighbouring columns in one request
            ) as file:
                rows = _with_long_offsets(file.read_row_group(group.index, columns=columns))
            if rows.num_rows != group.rows:
                raise OSError(f"{rows.num_rows} rows in row group {group.index}, not {group.rows}")
            return rows
        except (OSError, pa.ArrowException) as error:
            if wait_s is None:
                raise DataError(
                    f"shard {path} is missing or damaged ({error}): delete {folder} and run again "
                    "to prepare it anew"
                ) from None
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _with_long_offsets(rows: pa.Table) -> pa.Table:
    """Returns the table with 64-bit offsets: with 32 bits a joined column of bytes ends at 2 GB."""
    fields = [
        field.with_type(pa.large_binary()) if pa.types.is_binary(field.type) else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields)).combine_chunks()


def _rebatched(parts: Iterable[Batch], batch_rows: int) -> Iterator[Batch]:
    """Yields batches of exactly `batch_rows`, and the rows left as a last one."""
    waiting: list[Batch] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += len(part["row_id"])
        if held >= batch_rows:
            joined, start = waiting[0] if len(waiting) == 1 else concatenated(waiting), 0
            while held >= batch_rows:
                yield {name: v[start : start + batch_rows] for name, v in joined.items()}
                start, held = start + batch_rows, held - batch_rows
            waiting = [{name: values[start:] for name, values in joined.items()}] if held else []
    if held:
        yield concatenated(waiting)
