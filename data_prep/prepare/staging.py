"""The first half of preparing: cleans the listed images into staging files and makes an index.

Knows neither the order of rows nor shards. A task takes one piece of a listing, reads and cleans
its images one by one, writes them to one staging file and returns an index row for each: where its
bytes lie, its labels, its content hash, or why it was refused. A bad image takes no good one along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.checks import CleanImage, Rejection, clean_image, clean_mask
from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import TaskTable
from data_prep.prepare.index import Tables, index_schema
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


def pieces(listing: pa.Table) -> Tables:
    """Cuts the listing into pieces of one source and split, about PIECE_ROWS each.

    Cuts fall between row groups; only a group of more than four times PIECE_ROWS is cut itself. A
    piece carries its number in `piece`, and its text as it is, not as REPEATED: it travels.
    """
    rows = listing.num_rows
    sources = np.append(_changes(listing, ("source", "split")), rows)
    groups = np.union1d(sources, _changes(listing, ("path", "position")))
    cuts = [0]
    while cuts[-1] < rows:
        start = cuts[-1]
        other_source = sources[np.searchsorted(sources, start, side="right")]
        full = groups[np.searchsorted(groups, min(start + PIECE_ROWS, rows))]
        cuts.append(int(min(other_source, full, start + 4 * PIECE_ROWS)))
    return Tables(
        [
            partial(_piece, listing, number, first, end)
            for number, (first, end) in enumerate(pairwise(cuts))
        ]
    )


def stage_piece(piece: pa.Table, *, job: Job) -> pa.Table:
    """Cleans one piece into its staging file; returns its index (see index_schema)."""
    source = {s.source_name: s for s in job.data.sources}[piece["source"][0].as_py()]
    positions = {class_id: index for index, class_id in enumerate(job.table.classes)}
    part, num_masks = piece["piece"][0].as_py(), sum(1 for _ in segmentation_tasks(job.table))
    chunks: list[bytes] = []
    rows = []
    offset = 0
    raw_rows = source.read(job.root, piece)
    references = piece.select(["source", "source_id", "split", "class_ids"]).to_pylist()
    for reference, raw in zip(references, raw_rows, strict=True):
        blobs, reason, mistake = _clean_row(raw, job)
        content = hashlib.sha256(raw.image).digest()
        sizes = [len(blob) for blob in blobs]
        rows.append(
            reference
            | {
                "key": order_key(job.seed, content, reference["source"], reference["source_id"]),
                "content": content,
                "part": part,
                "offset": offset,
                "sizes": sizes,
                "class_indices": indices_of(reference.pop("class_ids"), positions),
                "reason": reason,
                "mistake": mistake,
            }
        )
        chunks += blobs
        offset += sum(sizes)
    write_bytes(join(job.folder, staging_file(part)), b"".join(chunks))
    return pa.Table.from_pylist(rows, schema=index_schema(num_masks))


def staging_file(number: int) -> str:
    """Returns the path of a staging file, below the folder of the preparation."""
    return f"{STAGING}/{number:06d}.bin"


def hashes(texts: Iterable[bytes]) -> NDArray[np.bytes_]:
    """Returns the sha256 of each text, as an array that compares and sorts as the hashes do."""
    return np.fromiter((hashlib.sha256(text).digest() for text in texts), "S32")


def order_key(seed: int, content: bytes, source: str, source_id: str) -> bytes:
    """Returns a row's key in the global order: random, yet decided by row and seed alone."""
    return hashlib.sha256(
        b"\0".join([str(seed).encode(), content, source.encode(), source_id.encode()])
    ).digest()


def indices_of(class_ids: Iterable[str], positions: Mapping[str, int]) -> list[int]:
    """Returns the global indices of a row's classes, each once, without those of no task."""
    return list(dict.fromkeys(positions[each] for each in class_ids if each in positions))


def task_labels(
    class_indices: Sequence[int], masks: Iterable[bool], table: TaskTable
) -> tuple[list[int], list[bool]]:
    """Returns the label of each task or -1, and whether it is active, for one row.

    `masks` says of each segmentation task whether the row has its mask.
    """
    present = iter(masks)
    labels, active = [], []
    for task in table.tasks:
        if task.kind == "segmentation":
            labels.append(-1)
            active.append(next(present))
            continue
        first = next((index for index in class_indices if index in task.class_indices), None)
        labels.append(-1 if first is None else task.class_indices.index(first))
        active.append(first is not None)
    return labels, active


def segmentation_tasks(table: TaskTable) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    """Yields (task name, mask key, number of labels, ignored values) of each segmentation task."""
    for task, mask, ignored in zip(table.tasks, table.masks, table.ignored, strict=True):
        if task.kind == "segmentation":
            yield task.name, mask, task.num_classes, ignored


def _piece(listing: pa.Table, number: int, first: int, end: int) -> pa.Table:
    piece = listing.slice(first, end - first)
    plain = [
        ("class_ids", pa.list_(pa.string())),
        ("source", pa.string()),
        ("split", pa.string()),
    ]
    for name, kind in plain:
        place = piece.column_names.index(name)
        piece = piece.set_column(place, name, piece[name].cast(kind))
    numbers = pa.array(np.full(end - first, number, np.int32))
    return piece.append_column("piece", numbers).combine_chunks()


def _changes(listing: pa.Table, columns: Sequence[str]) -> NDArray[np.int64]:
    """Returns the rows that differ from the one before in any of the columns, sorted."""
    found = np.zeros(listing.num_rows, bool)
    for name in columns:
        start, last = 0, None
        for chunk in filter(len, listing[name].chunks):  # joined, they would be copied
            values = chunk.indices if pa.types.is_dictionary(chunk.type) else chunk
            others = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1))
            found[start] |= start > 0 and chunk[0].as_py() != last
            found[start + 1 : start + len(chunk)] |= others.to_numpy(zero_copy_only=False)
            start, last = start + len(chunk), chunk[-1].as_py()
    return np.flatnonzero(found)


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
