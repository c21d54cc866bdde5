"""The first half of preparing: cleans the listed images into staging files and makes an index.

Knows neither the order of rows nor shards. A task takes one piece of a listing, reads and cleans
its images one by one, writes them to one staging file and returns an index row for each: where its
bytes lie, its labels, its content hash, or why it was refused. A bad image takes no good one along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.checks import CleanImage, Rejection, clean_image, clean_mask
from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import TaskTable
from data_prep.sources.base import RawRow
from data_prep.storage import join, write_bytes

PIECE_ROWS = 512
STAGING = "staging"


@dataclass(frozen=True)
class Job:
    """What every task of one preparation is given. `root` and `folder` are absolute."""

    data: DataConfig
    table: TaskTable
    seed: int
    root: str
    folder: str


@dataclass(frozen=True)
class Labels:
    """Labels of a row: the global indices of its classes; by task the label or -1, and activity."""

    class_indices: list[int]
    labels: list[int]
    task_mask: list[bool]


def index_schema(num_tasks: int) -> pa.Schema:
    """Returns the columns of the index.

    `sizes` are the bytes of the image and of each segmentation mask, which lie one after the other
    from `offset` in `part`. `reason` is why a row was refused, `mistake` a fault of the settings
    that it revealed; both are null for a good row.
    """
    return pa.schema(
        [
            ("key", pa.binary()),
            ("content", pa.binary()),
            ("source", pa.string()),
            ("source_id", pa.string()),
            ("split", pa.string()),
            ("part", pa.string()),
            ("offset", pa.int64()),
            ("sizes", pa.list_(pa.int64())),
            ("class_indices", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int16(), num_tasks)),
            ("task_mask", pa.list_(pa.bool_(), num_tasks)),
            ("reason", pa.string()),
            ("mistake", pa.string()),
        ]
    )


def pieces(listing: pa.Table) -> list[pa.Table]:
    """Cuts the listing into pieces of one source and split, about PIECE_ROWS each.

    Cuts fall between row groups; only a group of more than four times PIECE_ROWS is cut itself. A
    piece carries its number in `piece`.
    """
    other_source = _changes(listing, ("source", "split"))
    other_group = other_source | _changes(listing, ("path", "position"))
    cuts, start = [0], 0
    for row, (is_other_source, is_other_group) in enumerate(
        zip(other_source.tolist(), other_group.tolist(), strict=True), start=1
    ):
        size = row - start
        if is_other_source or (size >= PIECE_ROWS and is_other_group) or size >= 4 * PIECE_ROWS:
            cuts.append(row)
            start = row
    ends = [*cuts[1:], listing.num_rows]
    return [
        listing.slice(first, end - first)
        .append_column("piece", pa.array([number] * (end - first), pa.int32()))
        .combine_chunks()
        for number, (first, end) in enumerate(zip(cuts, ends, strict=True))
        if end > first
    ]


def stage_piece(piece: pa.Table, *, job: Job) -> pa.Table:
    """Cleans one piece into its staging file; returns its index (see index_schema)."""
    source = {s.source_name: s for s in job.data.sources}[piece["source"][0].as_py()]
    part = f"{STAGING}/{piece['piece'][0].as_py():06d}.bin"
    chunks: list[bytes] = []
    rows = []
    offset = 0
    raw_rows = source.read(job.root, piece)
    references = piece.select(["source", "source_id", "split", "class_ids"]).to_pylist()
    for reference, raw in zip(references, raw_rows, strict=True):
        blobs, reason, mistake = _clean_row(raw, job)
        content = hashlib.sha256(raw.image).digest()
        labels = row_labels(reference.pop("class_ids"), [bool(b) for b in blobs[1:]], job.table)
        sizes = [len(blob) for blob in blobs]
        rows.append(
            reference
            | {
                "key": order_key(job.seed, content, reference["source"], reference["source_id"]),
                "content": content,
                "part": part,
                "offset": offset,
                "sizes": sizes,
                "class_indices": labels.class_indices,
                "labels": labels.labels,
                "task_mask": labels.task_mask,
                "reason": reason,
                "mistake": mistake,
            }
        )
        chunks += blobs
        offset += sum(sizes)
    write_bytes(join(job.folder, part), b"".join(chunks))
    return pa.Table.from_pylist(rows, schema=index_schema(len(job.table.tasks)))


def hashes(texts: Iterable[bytes]) -> NDArray[np.bytes_]:
    """Returns the sha256 of each text, as an array that compares and sorts as the hashes do."""
    return np.fromiter((hashlib.sha256(text).digest() for text in texts), "S32")


def active_tasks(index: pa.Table, num_tasks: int) -> NDArray[np.bool_]:
    """Returns which tasks each row of an index is active in (rows, tasks)."""
    column = index["task_mask"].combine_chunks()
    parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    flat = [np.zeros(0, bool), *(part.flatten().to_numpy(zero_copy_only=False) for part in parts)]
    found: NDArray[np.bool_] = np.concatenate(flat).reshape(-1, num_tasks)
    return found


def order_key(seed: int, content: bytes, source: str, source_id: str) -> bytes:
    """Returns a row's key in the global order: random, yet decided by row and seed alone."""
    return hashlib.sha256(
        b"\0".join([str(seed).encode(), content, source.encode(), source_id.encode()])
    ).digest()


def row_labels(class_ids: list[str], masks: list[bool], table: TaskTable) -> Labels:
    """Returns the labels of a row; `masks` says of each segmentation task whether it has a mask."""
    position = {class_id: index for index, class_id in enumerate(table.classes)}
    indices = list(dict.fromkeys(position[c] for c in class_ids if c in position))
    present = iter(masks)
    labels, task_mask = [], []
    for task in table.tasks:
        if task.kind == "segmentation":
            labels.append(-1)
            task_mask.append(next(present))
            continue
        first = next((index for index in indices if index in task.class_indices), None)
        labels.append(-1 if first is None else task.class_indices.index(first))
        task_mask.append(first is not None)
    return Labels(indices, labels, task_mask)


def segmentation_tasks(table: TaskTable) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    """Yields (task name, mask key, number of labels, ignored values) of each segmentation task."""
    for task, mask, ignored in zip(table.tasks, table.masks, table.ignored, strict=True):
        if task.kind == "segmentation":
            yield task.name, mask, task.num_classes, ignored


def _changes(listing: pa.Table, columns: Sequence[str]) -> NDArray[np.bool_]:
    """Returns for each row but the first whether it differs from the one before."""
    found = np.zeros(max(0, listing.num_rows - 1), bool)
    for name in columns:
        cells = listing[name].combine_chunks()
        found |= pc.not_equal(cells.slice(1), cells.slice(0, len(found))).to_numpy(
            zero_copy_only=False
        )
    return found


def _clean_row(raw: RawRow, job: Job) -> tuple[list[bytes], str | None, str | None]:
    """Returns ([image, each task's mask or b""], why it is refused, mistake of the settings)."""
    wanted = list(segmentation_tasks(job.table))
    nothing = [b""] * (1 + len(wanted))
    if raw.error:
        return nothing, raw.error, None
    has_masks = any(mask in raw.masks for _, mask, _, _ in wanted)
    clean = clean_image(
        raw.image,
        short_side=job.data.stored_short_side,
        max_pixels=job.data.max_pixels,
        stored_format="webp" if has_masks else job.data.stored_format,
        jpeg_quality=job.data.jpeg_quality,
    )
    if isinstance(clean, Rejection):
        return nothing, clean.reason, None
    blobs = [clean.data]
    for name, mask, num_labels, ignored in wanted:
        try:
            blob = _mask_blob(raw.masks.get(mask), clean, num_labels, ignored, job.data.max_pixels)
        except DataError as error:
            return nothing, None, f"task '{name}': {error}"
        if isinstance(blob, Rejection):
            return nothing, blob.reason, None
        blobs.append(blob)
    return blobs, None, None


def _mask_blob(
    mask: bytes | None,
    image: CleanImage,
    num_labels: int,
    ignored: tuple[int, ...],
    max_pixels: float,
) -> bytes | Rejection:
    if mask is None:
        return b""
    return clean_mask(mask, image, num_labels=num_labels, ignored=ignored, max_pixels=max_pixels)
