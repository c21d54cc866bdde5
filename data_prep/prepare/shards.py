"""Prepares a data set: cleaned images, one global order, Parquet shards, manifest. See prepare().

    listing ─ stage_piece ─▶ staging files + index ─ order, splits ─▶ plans ─ write_shard ─▶ shards
              tasks            (staging.py)           driver           tasks

The order is decided from the index alone, and the writers fetch the bytes of their rows from the
staging files. So images never travel through a cluster-wide shuffle, and a task holds one shard in
memory however large the set is. The same inputs, settings and seed give the same bytes on any
machine, whether Ray Data or plain processes run the tasks.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    SplitInfo,
    TaskTable,
    write_manifest,
)
from data_prep.prepare.index import Part, Tables, index_schema, sizes_of, with_task
from data_prep.prepare.listing import list_sources
from data_prep.prepare.remarks import decide_single_class, remarks
from data_prep.prepare.splitting import ordered_splits, with_val
from data_prep.prepare.staging import (
    STAGING,
    Job,
    pieces,
    segmentation_tasks,
    stage_piece,
    staging_file,
    task_labels,
)
from data_prep.sources.base import counted, repeated
from data_prep.sources.remembering import forget
from data_prep.storage import (
    absolute,
    delete_file,
    delete_folder,
    filesystem,
    in_threads,
    join,
    write_bytes,
)

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the phase ("read" or "write"), the rows done and all rows."""
Run = Callable[[Sequence[pa.Table], Callable[..., pa.Table], Job], Iterable[pa.Table]]
"""Applies function(table, job=job) to each table; yields the results in the tables' order."""

SHARDS = "shards"
REJECTED_NAME = "rejected.parquet"
UNCOMPRESSED = "none"  # images are compressed already
ROW_GROUP_BYTES = 128 * 2**20  # of images and masks: a reader holds whole row groups


def prepare(
    data: DataConfig,
    table: TaskTable,
    *,
    seed: int,
    output: str,
    splits: Sequence[str] = ("train", "val"),
    progress: Progress | None = None,
    run: Run | None = None,
) -> Manifest:
    """Prepares `splits` (train, val or both) of all sources into the folder or URI `output`.

    `run` applies a function to tables; None runs it as Ray Data tasks, for which Ray must be
    initialised. Unreadable images are left out and listed in rejected.parquet (source, id, reason).
    Raises DataError where files are missing, where more than `max_bad_fraction` of the images are
    unreadable, where a mask has a value outside its labels, where a split or a training task has no
    image, and where `single_class` is true and no training image has one class. An interrupted or
    failed run leaves no manifest.
    """
    job = Job(data, table, seed, absolute(data.root), absolute(output))
    report = progress or (lambda phase, done, total: None)
    run = run or run_with_ray
    delete_file(join(job.folder, MANIFEST_NAME))
    for part in (STAGING, SHARDS):
        delete_folder(join(job.folder, part))
    listing = list_sources(job, splits)
    forget()  # it is the last to look at the sources
    tables, total = pieces(listing.references), listing.references.num_rows
    # Listings and indices grow with the number of images: each goes when it is used up.
    listing = replace(listing, references=listing.references.schema.empty_table())
    index, rejects = _staged(tables, total, job, report, run)
    del tables
    rejected, unreadable = _reject(rejects, total, job)
    index, late = _without_unassigned(index, job)
    if listing.divides:
        index = with_val(index, data)
    parts = ordered_splits(index, data, seed, splits)
    del index
    single_class, exceptions = decide_single_class(parts, data.single_class)
    found = [*listing.notes, *unreadable, *remarks(parts, table, listing.seen), *exceptions]
    if data.val_fraction is not None and "train" in splits and not listing.divides:
        found.append("data.val_fraction has no effect, because the sources have a val split")
    for remark in found:
        logger.warning("%s", remark)
    shards = _written(parts, job, report, run)
    manifest = Manifest(
        image_size=data.size,
        tasks=table.tasks,
        classes=table.classes,
        class_names=table.class_names,
        single_class=single_class,
        seed=seed,
        splits=shards,
        unassigned={split: listing.unassigned[split] + late.get(split, 0) for split in splits},
        rejected=rejected,
        fingerprint=_fingerprint(shards, table),
        sources=listing.sources,
        remarks=tuple(found),
    )
    delete_folder(join(job.folder, STAGING))
    write_manifest(job.folder, manifest)
    return manifest


def row_schema(table: TaskTable) -> pa.Schema:
    """Returns the columns of a shard.

    `class_label` is the global class index, -1 unless the row has exactly one. `labels` holds the
    label of each task (-1 where it is not active or a segmentation), `task_mask` whether the task
    is active. `mask_<task>` is a PNG, null where the image has none.
    """
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
    """Writes one shard from the staging files; returns its entry for the manifest."""
    names = [name for name, *_ in segmentation_tasks(job.table)]
    blobs, indices = _fetch(plan, job), plan["class_indices"].to_pylist()
    labels = [
        task_labels(own, map(bool, row[1:]), job.table)
        for own, row in zip(indices, blobs, strict=True)
    ]
    columns = [
        plan["row_id"],
        plan["source_id"].cast(pa.string()),
        [row[0] for row in blobs],
        [own[0] if len(own) == 1 else -1 for own in indices],
        [of_tasks for of_tasks, _ in labels],
        [active for _, active in labels],
        *([row[1 + number] or None for row in blobs] for number in range(len(names))),
    ]
    rows = pa.table(columns, schema=row_schema(job.table))
    stream = io.BytesIO()
    with pq.ParquetWriter(
        stream,
        rows.schema,
        compression=UNCOMPRESSED,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        sizes = [sum(map(len, row)) for row in blobs]
        for first, end in pairwise(_group_cuts(sizes, job.data.row_group_rows)):
            writer.write_table(rows.slice(first, end - first))
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


def run_with_ray(
    tables: Sequence[pa.Table], function: Callable[..., pa.Table], job: Job
) -> Iterable[pa.Table]:
    """The default `Run`: a Ray task of one CPU for each table."""
    from data_prep.ray_data import map_tables  # here, so that preparing works without Ray

    dataset = map_tables(tables, function, num_cpus=1, job=job)
    batches: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return batches


def _staged(
    tables: Sequence[pa.Table], total: int, job: Job, report: Progress, run: Run
) -> tuple[pa.Table, pa.Table]:
    """Returns the index of the `total` rows in these pieces, without refused ones, and those.

    Raises DataError at the first row that reveals a mistake of the settings.
    """
    schema = index_schema(sum(1 for _ in segmentation_tasks(job.table)))
    rejects, done = [schema.empty_table()], 0
    found: dict[str, list[pa.Array]] = {
        name: [pa.array([], schema.field(name).type)]
        for name in schema.names
        if name not in ("reason", "mistake")
    }
    for part in run(tables, stage_piece, job):
        for row in part.filter(pc.is_valid(part["mistake"])).to_pylist():
            raise DataError(f"image {row['source_id']} of source {row['source']}: {row['mistake']}")
        done += part.num_rows
        report("read", done, total)
        if part["reason"].null_count < part.num_rows:
            rejects.append(part.filter(pc.is_valid(part["reason"])))
            part = part.filter(pc.is_null(part["reason"]))
        for name, arrays in found.items():
            arrays += part[name].chunks
    # Column by column, so that no more than one is there twice.
    index = pa.table({name: pa.concat_arrays(found.pop(name)) for name in list(found)})
    return index, pa.concat_tables(rejects)


def _reject(rejects: pa.Table, total: int, job: Job) -> tuple[int, list[str]]:
    """Writes rejected.parquet; returns the number of rejects and a sentence on them.

    Raises DataError where there are too many of `total`. One image is not, unless none may be.
    """
    columns = [rejects[name].cast(pa.string()) for name in ("source", "source_id", "reason")]
    rejects = pa.table(columns, ["source", "id", "reason"])
    where = join(job.folder, REJECTED_NAME)
    stream = io.BytesIO()
    rejects = rejects.sort_by([("source", "ascending"), ("id", "ascending")])
    pq.write_table(rejects, stream)
    write_bytes(where, stream.getvalue())
    count, share = int(rejects.num_rows), job.data.max_bad_fraction
    if not count:
        return 0, []
    first = rejects.slice(0, 1).to_pylist()[0]
    example = f"such as {first['id']} ({first['reason']})"
    if count > (max(1, share * total) if share else 0):
        raise DataError(
            f"{count} of {total} images are unreadable, {example}: more than "
            f"data.max_bad_fraction {share:g}. Repair them or raise that field; {where} lists all"
        )
    return count, [
        f"left out {counted(count, 'unreadable image')}, {example}: {REJECTED_NAME} lists all"
    ]


def _without_unassigned(index: pa.Table, job: Job) -> tuple[pa.Table, dict[str, int]]:
    """Returns the index without rows of no task, unless kept, and their number by split."""
    active = with_task(index)
    if active.all():  # a filter copies
        return index, {}
    counts = pc.value_counts(index["split"].filter(pa.array(~active))).to_pylist()
    late = {each["values"]: each["counts"] for each in counts}
    return (index.filter(pa.array(active)) if job.data.unassigned == "drop" else index), late


def _written(parts: dict[str, Part], job: Job, report: Progress, run: Run) -> dict[str, SplitInfo]:
    """Writes the shards of all splits; returns their entries for the manifest."""
    plans = Tables([plan for split, part in parts.items() for plan in _plans(split, part, job)])
    shards: dict[str, list[ShardInfo]] = {split: [] for split in parts}
    done, total = 0, sum(part.num_rows for part in parts.values())
    for entries in run(plans, write_shard, job):
        for row in entries.to_pylist():
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


def _plans(split: str, part: Part, job: Job) -> Iterator[Callable[[], pa.Table]]:
    """Cuts a split into shards of about `shard_bytes` each; yields what makes the plan of each."""
    if not part.num_rows:
        return
    sizes = sizes_of(part.index)[part.rows.to_numpy()].sum(axis=1, dtype=np.int64)
    count = min(part.num_rows, max(1, round(sizes.sum() / job.data.shard_bytes)))
    ends = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, count + 1) / count) + 1
    cuts = sorted({0, *np.minimum(ends, part.num_rows).tolist()})
    for number, (first, end) in enumerate(pairwise(cuts)):
        yield partial(_plan, split, part, f"{SHARDS}/{split}-{number:05d}.parquet", first, end)


def _plan(split: str, part: Part, path: str, first: int, end: int) -> pa.Table:
    """Returns rows of a split with the columns that write_shard needs."""
    columns = ["source_id", "part", "offset", "sizes", "class_indices"]
    plan = part.index.select(columns).take(part.rows.slice(first, end - first))
    return (
        plan.append_column("row_id", pa.array(np.arange(first, end) + part.first_id))
        .append_column("split", repeated(split, end - first))
        .append_column("shard", repeated(path, end - first))
    )


def _group_cuts(sizes: Sequence[int], group_rows: int) -> list[int]:
    """Returns where row groups begin, and the end: `group_rows` each, or ROW_GROUP_BYTES."""
    cuts, held = [0], 0
    for row, size in enumerate(sizes):
        full = row - cuts[-1] >= group_rows or held + size > ROW_GROUP_BYTES
        if full and row > cuts[-1]:
            cuts.append(row)
            held = 0
        held += size
    return [*cuts, len(sizes)]


def _fetch(plan: pa.Table, job: Job) -> list[list[bytes]]:
    """Reads the image and masks of each row: staging files in threads, each from front to back."""
    parts, offsets = plan["part"].to_pylist(), plan["offset"].to_pylist()
    sizes = plan["sizes"].to_pylist()
    wanted: dict[int, list[int]] = {}
    for row in sorted(range(len(parts)), key=lambda row: (parts[row], offsets[row])):
        wanted.setdefault(parts[row], []).append(row)

    def read(part: int) -> list[bytes]:
        store, inner = filesystem(join(job.folder, staging_file(part)))
        with store.open_input_file(inner) as file:
            return [file.read_at(sum(sizes[row]), offsets[row]) for row in wanted[part]]

    found: list[list[bytes]] = [[] for _ in parts]
    for rows, blobs in zip(wanted.values(), in_threads(read, wanted), strict=True):
        for row, blob in zip(rows, blobs, strict=True):
            ends = np.cumsum(sizes[row]).tolist()
            found[row] = [
                blob[end - size : end] for size, end in zip(sizes[row], ends, strict=True)
            ]
    return found


def _fingerprint(shards: dict[str, SplitInfo], table: TaskTable) -> str:
    hashes = [shard.sha256 for split in shards.values() for shard in split.shards]
    tasks = [asdict(task) for task in table.tasks]
    return hashlib.sha256(json.dumps([hashes, tasks, table.classes]).encode()).hexdigest()
