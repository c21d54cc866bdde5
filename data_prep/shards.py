"""Preparing a data set: cleaning, one global order, Parquet shards, manifest. See prepare().

    listing ─ stage_piece ─▶ staging files + index ─ order, splits ─▶ plans ─ write_shard ─▶ shards
              Ray Data tasks   (staging.py)           driver           Ray Data tasks

The order is settled from the index alone, and the writers fetch their rows' bytes from the staging
files: images never travel through a cluster-wide shuffle, and memory holds one shard a task however
large the set is. The same inputs, settings and seed give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.listing import list_sources
from data_prep.ray_data import map_tables
from data_prep.schema import (
    MANIFEST_NAME,
    SPLITS,
    DataConfig,
    DataError,
    Manifest,
    ShardInfo,
    SplitInfo,
    TaskTable,
    write_manifest,
)
from data_prep.staging import (
    STAGING,
    Job,
    pieces,
    segmentation_tasks,
    stage_piece,
)
from data_prep.storage import (
    absolute,
    delete_file,
    delete_folder,
    filesystem,
    join,
    write_bytes,
)

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # phase ("read" or "write"), rows done, rows in all

SHARDS = "shards"
REJECTED_NAME = "rejected.parquet"
UNCOMPRESSED = "none"  # images are compressed already


def prepare(
    data: DataConfig,
    table: TaskTable,
    *,
    seed: int,
    output: str,
    splits: Sequence[str] = ("train", "val"),
    progress: Progress | None = None,
) -> Manifest:
    """Prepare `splits` (train and/or val) of all sources into the folder or URI `output`.

    Ray must be initialised. Unreadable images are left out and listed in rejected.parquet (source,
    id, reason). DataError: files missing, more than `max_bad_fraction` unreadable, a mask value
    outside its labels, a split or a training task without images. An interrupted or failed run
    leaves no manifest."""
    job = Job(data, table, seed, absolute(data.root), absolute(output))
    report = progress or (lambda phase, done, total: None)
    delete_file(join(job.folder, MANIFEST_NAME))
    for part in (STAGING, SHARDS):
        delete_folder(join(job.folder, part))
    listing, sources, dropped = list_sources(job, splits)
    index = _staged(listing, job, report)
    rejected = _reject(index, job)
    index = index.filter(pc.is_null(index["reason"]))
    index, late = _without_unassigned(index, data)
    parts = _ordered_splits(index, data, seed, splits)
    shards = _written(parts, job, report)
    manifest = Manifest(
        image_size=data.size,
        tasks=table.tasks,
        classes=table.classes,
        class_names=table.class_names,
        single_class=all(
            pc.all(pc.equal(pc.list_value_length(part["class_indices"]), 1)).as_py()
            for part in parts.values()
            if part.num_rows
        ),
        seed=seed,
        splits=shards,
        unassigned={split: dropped[split] + late.get(split, 0) for split in splits},
        rejected=rejected,
        fingerprint=_fingerprint(shards, table),
        sources=sources,
    )
    delete_folder(join(job.folder, STAGING))
    write_manifest(job.folder, manifest)
    return manifest


def row_schema(table: TaskTable) -> pa.Schema:
    """Columns of a shard. `class_label`: global class index, -1 unless the row has exactly one.
    `labels`, `task_mask`: per task the label (-1 where not active or a segmentation) and whether it
    is active. `mask_<task>`: PNG, null where the image has none."""
    count = len(table.tasks)
    return pa.schema(
        [
            ("row_id", pa.int64()),
            ("source_id", pa.string()),
            ("image", pa.binary()),
            ("class_label", pa.int32()),
            ("labels", pa.list_(pa.int16(), count)),
            ("task_mask", pa.list_(pa.bool_(), count)),
            *((f"mask_{name}", pa.binary()) for name, *_ in segmentation_tasks(table)),
        ]
    )


def write_shard(plan: pa.Table, *, job: Job) -> pa.Table:
    """Fetch the rows of one shard from the staging files, write it, return its manifest entry."""
    names = [name for name, *_ in segmentation_tasks(job.table)]
    blobs = _fetch(plan, job)
    class_labels = [
        indices[0] if len(indices) == 1 else -1 for indices in plan["class_indices"].to_pylist()
    ]
    columns = [
        plan["row_id"],
        plan["source_id"],
        [row[0] for row in blobs],
        class_labels,
        plan["labels"].combine_chunks(),
        plan["task_mask"].combine_chunks(),
        *([row[1 + number] or None for row in blobs] for number in range(len(names))),
    ]
    rows = pa.table(columns, schema=row_schema(job.table))
    stream = io.BytesIO()
    pq.write_table(
        rows,
        stream,
        row_group_size=job.data.row_group_rows,
        compression=UNCOMPRESSED,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    content = stream.getvalue()
    path = plan["shard"][0].as_py()
    write_bytes(join(job.folder, path), content)
    groups = pq.ParquetFile(io.BytesIO(content)).metadata
    info = ShardInfo(
        path=path,
        rows=rows.num_rows,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        row_group_rows=tuple(groups.row_group(i).num_rows for i in range(groups.num_row_groups)),
    )
    return pa.table({"split": [plan["split"][0].as_py()], "info": [info.model_dump_json()]})


def _staged(listing: pa.Table, job: Job, report: Progress) -> pa.Table:
    """The index of all rows; DataError at the first row that reveals a mistake in the settings."""
    dataset = map_tables(pieces(listing), stage_piece, num_cpus=1, job=job)
    found, done = [], 0
    for part in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in part.filter(pc.is_valid(part["mistake"])).to_pylist():
            raise DataError(f"image {row['source_id']} of source {row['source']}: {row['mistake']}")
        found.append(part)
        done += part.num_rows
        report("read", done, listing.num_rows)
    return pa.concat_tables(found)


def _reject(index: pa.Table, job: Job) -> int:
    """Write rejected.parquet; number of rejects, DataError if they are too many."""
    rejects = index.filter(pc.is_valid(index["reason"]))
    rejects = rejects.select(["source", "source_id", "reason"]).rename_columns(
        ["source", "id", "reason"]
    )
    where = join(job.folder, REJECTED_NAME)
    stream = io.BytesIO()
    pq.write_table(rejects.sort_by([("source", "ascending"), ("id", "ascending")]), stream)
    write_bytes(where, stream.getvalue())
    limit = job.data.max_bad_fraction
    if rejects.num_rows > limit * index.num_rows:
        raise DataError(
            f"{rejects.num_rows} of {index.num_rows} images are unreadable, more than "
            f"data.max_bad_fraction {limit:g}; {where} lists them: mend them or raise the key"
        )
    if rejects.num_rows:
        logger.warning("%d unreadable images left out, see %s", rejects.num_rows, where)
    return int(rejects.num_rows)


def _without_unassigned(index: pa.Table, data: DataConfig) -> tuple[pa.Table, dict[str, int]]:
    """(index without rows of no task, unless they are kept; their number by split)."""
    active = np.array(index["task_mask"].to_pylist(), bool).reshape(index.num_rows, -1).any(axis=1)
    splits = np.array(index["split"].to_pylist())
    counts = {str(split): int((~active & (splits == split)).sum()) for split in np.unique(splits)}
    return (index.filter(pa.array(active)) if data.unassigned == "drop" else index), counts


def _ordered_splits(
    index: pa.Table, data: DataConfig, seed: int, splits: Sequence[str]
) -> dict[str, pa.Table]:
    """Rows of train, holdout and val in their final order, with `split` and unique `row_id`."""
    index = index.sort_by([("key", "ascending")])
    parts = {split: index.filter(pc.equal(index["split"], split)) for split in splits}
    if "train" in parts:
        held = pa.array(_held_out(parts["train"]["content"].to_pylist(), data, seed), pa.bool_())
        train = parts["train"]
        parts |= {"train": train.filter(pc.invert(held)), "holdout": train.filter(held)}
    ordered, first_id = {}, 0
    for split in (name for name in SPLITS if name in parts):
        part = parts[split]
        if not part.num_rows and split != "holdout":
            raise DataError(
                f"no readable {split} image is left of any task; look at {REJECTED_NAME}, "
                "data.unassigned and data.holdout_fraction"
            )
        ids = pa.array(range(first_id, first_id + part.num_rows), pa.int64())
        names = pa.array([split] * part.num_rows, pa.string())
        ordered[split] = part.drop_columns(["split"]).append_column("split", names)
        ordered[split] = ordered[split].append_column("row_id", ids)
        first_id += part.num_rows
    return ordered


def _held_out(contents: list[bytes], data: DataConfig, seed: int) -> list[bool]:
    """Which rows are kept out of training: whole groups of equal images, chosen by content hash."""
    wanted = math.ceil(data.holdout_fraction * len(contents))
    keys = [hashlib.sha256(b"holdout\0%d\0" % seed + content).digest() for content in contents]
    if not wanted:
        return [False] * len(keys)
    limit = sorted(keys)[wanted - 1]
    return [key <= limit for key in keys]


def _written(parts: dict[str, pa.Table], job: Job, report: Progress) -> dict[str, SplitInfo]:
    plans = [plan for split, part in parts.items() for plan in _plans(split, part, job.data)]
    dataset = map_tables(plans, write_shard, num_cpus=1, job=job)
    shards: dict[str, list[ShardInfo]] = {split: [] for split in parts}
    done, total = 0, sum(part.num_rows for part in parts.values())
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            info = ShardInfo.model_validate_json(row["info"])
            shards[row["split"]].append(info)
            done += info.rows
        report("write", done, total)
    return {
        split: SplitInfo(
            rows=sum(info.rows for info in infos),
            bytes=sum(info.bytes for info in infos),
            shards=tuple(sorted(infos, key=lambda info: info.path)),
        )
        for split, infos in shards.items()
    }


def _plans(split: str, part: pa.Table, data: DataConfig) -> Iterator[pa.Table]:
    """The split cut into shards of about shard_bytes each; columns write_shard needs."""
    if not part.num_rows:
        return
    sizes = np.array([sum(row) for row in part["sizes"].to_pylist()])
    count = min(part.num_rows, max(1, round(sizes.sum() / data.shard_bytes)))
    ends = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, count + 1) / count) + 1
    cuts = sorted({0, *np.minimum(ends, part.num_rows).tolist()})
    for number, (first, end) in enumerate(pairwise(cuts)):
        plan = part.slice(first, end - first)
        path = f"{SHARDS}/{split}-{number:05d}.parquet"
        yield plan.append_column("shard", pa.array([path] * plan.num_rows, pa.string()))


def _fetch(plan: pa.Table, job: Job) -> list[list[bytes]]:
    """Image and mask bytes of each row, read file by file, each file from front to back."""
    parts, offsets = plan["part"].to_pylist(), plan["offset"].to_pylist()
    sizes = plan["sizes"].to_pylist()
    found: list[list[bytes]] = [[] for _ in parts]
    wanted: dict[str, list[int]] = {}
    for row in sorted(range(len(parts)), key=lambda row: (parts[row], offsets[row])):
        wanted.setdefault(parts[row], []).append(row)
    for part, rows in wanted.items():
        store, inner = filesystem(join(job.folder, part))
        with store.open_input_file(inner) as file:
            for row in rows:
                blob = file.read_at(sum(sizes[row]), offsets[row])
                ends = np.cumsum(sizes[row]).tolist()
                found[row] = [
                    blob[end - size : end] for size, end in zip(sizes[row], ends, strict=True)
                ]
    return found


def _fingerprint(shards: dict[str, SplitInfo], table: TaskTable) -> str:
    hashes = [shard.sha256 for split in shards.values() for shard in split.shards]
    tasks = [asdict(task) for task in table.tasks]
    return hashlib.sha256(json.dumps([hashes, tasks, table.classes]).encode()).hexdigest()
