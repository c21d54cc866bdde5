"""Keeps a split's rows decoded on a local disk, so that an epoch cuts them without decoding.

    <cache>/<fingerprint>-<split>-<H>x<W>/
      pixels      uint8: of each row the image (h, w, 3), then its masks (h, w)
      rows.npz    where each row's pixels start, their size, its labels

Rows are those of the shards, in their order, as `Decoder.opened` returns them: batches are the same
with and without. A folder is renamed to its name when it is whole. The first process that needs one
makes it, others on the machine wait for it and share its pages in memory. N rows, S segmentations.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.read.decoding import Batch, Decoder, Pixels, concatenated, labels_of

log = logging.getLogger(__name__)

PIXELS, ROWS = "pixels", "rows.npz"
LABELS = ("class_label", "labels", "task_mask", "row_id")
SPARE_BYTES = 2**30  # that stay free on the disk
Chunk = tuple[list[Pixels], Batch]  # layers to write one after the other, and what is known of rows


@dataclass(frozen=True, eq=False)
class DecodedRows:
    """The rows of a split. `table` has `start` (N,), `size` (N, 2), `masks` (N, S) and labels."""

    pixels: Pixels
    table: Batch

    def decode(self, numbers: NDArray[np.int64], decoder: Decoder) -> Batch:
        """Returns a batch of the rows `numbers` (B,); see `Decoder.decode`."""
        own = {name: values[numbers] for name, values in self.table.items()}
        layers = (
            self._layers(*row, decoder.segmentations)
            for row in zip(own["start"].tolist(), own["size"].tolist(), own["masks"], strict=True)
        )
        return decoder.cut(layers, {name: own[name] for name in LABELS})

    def _layers(
        self, start: int, size: tuple[int, int], has: NDArray[np.bool_], names: tuple[str, ...]
    ) -> tuple[Pixels, dict[str, Pixels]]:
        height, width = size
        area = height * width
        image = self.pixels[start : start + 3 * area].reshape(height, width, 3)
        start += 3 * area
        masks = {}
        for name in (name for name, there in zip(names, has.tolist(), strict=True) if there):
            masks[name] = self.pixels[start : start + area].reshape(height, width)
            start += area
        return image, masks


def decoded_rows(
    folder: Path,
    limit_bytes: float,
    rows: int,
    decoder: Decoder,
    tables: Callable[[Callable[[pa.Table], Chunk]], Iterable[Chunk]],
) -> DecodedRows | None:
    """Returns the decoded rows in `folder`, which it makes where it is missing.

    `tables(function)` applies a function to all rows of the split in order, table by table. Folders
    beside this one that were not used for longest are removed until all together have at most
    `limit_bytes`. Returns None, and says why once, where the rows alone have more than that or the
    disk is full.
    """
    found = _opened(folder)
    if found is not None or folder in _TOO_LARGE:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends
        found = _opened(folder)
        if found is not None:
            return found
        try:
            _make(folder, limit_bytes, rows, decoder, tables)
        except _TooLargeError as error:
            _TOO_LARGE.add(folder)
            log.warning("images are decoded in every epoch: %s", error)
    return _opened(folder)


class _TooLargeError(Exception):
    """Raised where decoded rows take more than they may."""


_TOO_LARGE: set[Path] = set()  # not tried again by this process


_OPEN: dict[Path, DecodedRows] = {}
"""What this process has opened. It is read on although another one has removed the folder since."""


def _opened(folder: Path) -> DecodedRows | None:
    """Returns what a whole folder holds, and marks it as used."""
    with contextlib.suppress(OSError):
        os.utime(folder)
    if folder in _OPEN:
        return _OPEN[folder]
    try:
        with np.load(folder / ROWS) as file:
            table = {name: file[name] for name in file.files}
        pixels = np.asarray(np.memmap(folder / PIXELS, np.uint8, mode="r"))
    except FileNotFoundError:
        return None
    return _OPEN.setdefault(folder, DecodedRows(pixels, table))


def _make(
    folder: Path,
    limit_bytes: float,
    rows: int,
    decoder: Decoder,
    tables: Callable[[Callable[[pa.Table], Chunk]], Iterable[Chunk]],
) -> None:
    least = rows * 3 * decoder.size[0] * decoder.size[1]
    _make_room(folder.parent, least, limit_bytes)
    _require_space(folder.parent, least)
    log.info("decoding %s images once, at least %.1f GiB, to %s", rows, least / 2**30, folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        found: list[Batch] = []
        with (part / PIXELS).open("wb") as file:
            written = 0
            for layers, known in tables(partial(_decoded, decoder=decoder)):
                found.append({**known, "start": known["start"].astype(np.int64) + written})
                for layer in layers:
                    file.write(layer.data)
                    written += layer.nbytes
                if written > limit_bytes:
                    raise _TooLargeError(_too_much(written, limit_bytes))
            _to_disk(file)
        _make_room(folder.parent, written, limit_bytes)
        with (part / ROWS).open("wb") as file:
            np.savez(file, **concatenated(found))  # type: ignore[arg-type]
            _to_disk(file)
        part.rename(folder)
    except OSError as error:
        raise _TooLargeError(f"{folder.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _decoded(rows: pa.Table, *, decoder: Decoder) -> Chunk:
    """Opens the rows of a table; `start` counts from its first pixel."""
    layers: list[Pixels] = []
    sizes, starts, start = [], [], 0
    masks = np.zeros((rows.num_rows, len(decoder.segmentations)), bool)
    for index, (pixels, own) in enumerate(decoder.opened_rows(rows)):
        sizes.append(pixels.shape[:2])
        starts.append(start)
        masks[index] = [name in own for name in decoder.segmentations]
        assert all(own[name].shape == pixels.shape[:2] for name in own), "a mask of another size"
        for layer in (pixels, *(own[name] for name in decoder.segmentations if name in own)):
            layers.append(np.ascontiguousarray(layer))
            start += layer.nbytes
    known: dict[str, Any] = {
        "start": np.array(starts, np.int64),
        "size": np.array(sizes, np.int64).reshape(-1, 2),
        "masks": masks,
    }
    return layers, {**known, **labels_of(rows, decoder.num_tasks)}


def _make_room(cache: Path, wanted: float, limit_bytes: float) -> None:
    """Removes folders that were not used for longest, until `wanted` bytes more fit."""
    if wanted > limit_bytes:
        raise _TooLargeError(_too_much(wanted, limit_bytes))
    sizes = {each: _bytes_of(each) for each in sorted(_folders(cache), key=_last_used)}
    for each in list(sizes):
        if sum(sizes.values()) + wanted <= limit_bytes:
            break
        log.info("removing decoded images that were not used for longest: %s", each)
        shutil.rmtree(each, ignore_errors=True)
        del sizes[each]


def _require_space(cache: Path, wanted: float) -> None:
    free = shutil.disk_usage(cache).free
    if wanted + SPARE_BYTES > free:
        raise _TooLargeError(
            f"{cache} has {free / 2**30:.1f} GiB left, and decoded they take "
            f"{wanted / 2**30:.1f} GiB"
        )


def _too_much(wanted: float, limit_bytes: float) -> str:
    return (
        f"decoded they take {wanted / 2**30:.1f} GiB or more, and data.cache_gib allows "
        f"{limit_bytes / 2**30:.1f}"
    )


def _folders(cache: Path) -> Iterator[Path]:
    return (each for each in cache.iterdir() if each.is_dir() and not each.name.startswith("."))


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0


def _bytes_of(folder: Path) -> int:
    try:
        return (folder / PIXELS).stat().st_size
    except FileNotFoundError:
        return 0


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
