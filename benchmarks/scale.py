"""Measures what `mantis prepare` takes as sets grow: the driver's memory, and calls of a bucket.

    python -m benchmarks.scale --images 325000,650000,1300000 --classes 1000
    python -m benchmarks.scale --images 1000 --files 500 --latency-ms 20

Memory: no image exists. What the bucket lists, what the tasks that read images return and what the
tasks that write shards return are made up, with names, hashes and labels as those of a folder of
classes. All that the driver does with them is real: fingerprint, listing, pieces, index, hold-out,
order, plans, manifest. Each size is a process of its own, and `peak_mb` its peak resident memory,
imports included. `arrow_bytes_per_row` is the peak of Arrow's tables alone, `driver_bytes_per_row`
the slope of `peak_mb` between the smallest and the largest size.

Calls: `--files` small files lie in a bucket of which each call takes `--latency-ms` more. `parquet`
lists that many Parquet files, `images` reads that many images. `sequential_over_measured` is the
time that the calls would wait one after the other, over the time that it took.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from rich.console import Console
from rich.table import Table

from benchmarks.bucket import Bucket, as_bucket
from benchmarks.program import count, listed, one_message, say
from data_prep.config import DataConfig, TaskConfig
from data_prep.finding import source_fingerprint
from data_prep.manifest import ShardInfo
from data_prep.prepare.index import index_schema
from data_prep.prepare.shards import prepare, write_shard
from data_prep.prepare.staging import Job, indices_of, order_key
from data_prep.sources.base import repeated
from data_prep.sources.folder import ImageFolder
from data_prep.sources.parquet import ParquetFiles
from data_prep.sources.remembering import one_look
from data_prep.tasks import resolve_tasks

IMAGE_BYTES = 20_000
VAL_SHARE = 26  # one val image to so many training images, as ImageNet-1k has


class MadeUp(Bucket):
    """A bucket of class folders below `train` and `val` that holds nothing but names."""

    def __init__(self, images: int, classes: int) -> None:
        super().__init__(".")
        self._images, self._names = images, [f"n{number:08d}" for number in range(classes)]

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        folders = ("train", "val")
        kinds = [
            fs.FileType.Directory if p.endswith(folders) else fs.FileType.NotFound for p in paths
        ]
        return [fs.FileInfo(path, kind) for path, kind in zip(paths, kinds, strict=True)]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        above, _, name = selector.base_dir.rpartition("/")
        if name not in self._names:
            folders = [f"{selector.base_dir}/{each}" for each in self._names]
            return [fs.FileInfo(path, fs.FileType.Directory) for path in folders]
        val = self._images // VAL_SHARE
        of_split, classes = val if above.endswith("val") else self._images - val, len(self._names)
        own = of_split // classes + (self._names.index(name) < of_split % classes)
        files = [f"{selector.base_dir}/{name}_{index}.JPEG" for index in range(own)]
        return [fs.FileInfo(path, fs.FileType.File, size=IMAGE_BYTES) for path in files]


def measure(images: int, classes: int) -> dict[str, float]:
    """Prepares `images` made-up images in this process; returns their number and its memory."""
    with (
        as_bucket(MadeUp(images, classes)) as root,
        tempfile.TemporaryDirectory() as output,
        one_look(),
    ):
        data = DataConfig(root=root, sources=(ImageFolder(kind="image_folder"),), image_size=224)
        table = resolve_tasks((TaskConfig(name="all", classes="all"),), data)
        source_fingerprint(data, table)
        manifest = prepare(data, table, seed=0, output=output, run=made_up_run)
    rows = sum(split.rows for split in manifest.splits.values())
    arrow = pa.default_memory_pool().max_memory() / rows
    return {"images": rows, "peak_mb": round(peak_mb(), 1), "arrow_bytes_per_row": round(arrow)}


def made_up_run(
    tables: Sequence[pa.Table], function: Callable[..., pa.Table], job: Job
) -> Iterable[pa.Table]:
    """Stands for the Ray tasks of `prepare`: returns what they would. Reads and writes nothing."""
    positions = {class_id: index for index, class_id in enumerate(job.table.classes)}
    return map(_written if function is write_shard else partial(_staged, job, positions), tables)


def _staged(job: Job, positions: dict[str, int], piece: pa.Table) -> pa.Table:
    """Returns the index of a piece, as stage_piece does."""
    rows, (source, split) = piece.num_rows, (piece[name][0].as_py() for name in ("source", "split"))
    ids = piece["source_id"].to_pylist()
    contents = [hashlib.sha256(each.encode()).digest() for each in ids]
    columns = [
        [order_key(job.seed, *row) for row in zip(contents, [source] * rows, ids, strict=True)],
        contents,
        repeated(source, rows),
        piece["source_id"],
        repeated(split, rows),
        np.full(rows, piece["piece"][0].as_py(), np.int32),
        np.arange(rows) * IMAGE_BYTES,
        [[IMAGE_BYTES]] * rows,
        [indices_of(own, positions) for own in piece["class_ids"].to_pylist()],
        [None] * rows,
        [None] * rows,
    ]
    return pa.table(columns, schema=index_schema(0))


def _written(plan: pa.Table) -> pa.Table:
    """Returns the manifest's entry of a shard, as write_shard does."""
    info = ShardInfo(
        path=plan["shard"][0].as_py(),
        rows=plan.num_rows,
        bytes=plan.num_rows * IMAGE_BYTES,
        sha256="0" * 64,
        row_group_rows=(plan.num_rows,),
    )
    return pa.table({"split": [plan["split"][0].as_py()], "info": [info.model_dump_json()]})


def measure_calls(files: int, latency_s: float) -> dict[str, dict[str, float]]:
    """Lists so many Parquet files and reads so many images of a slow bucket; see the module."""
    parquet = ParquetFiles(kind="parquet", train="*.parquet", class_column="label")
    folder = ImageFolder(kind="image_folder")

    def list_parquet(root: str) -> None:
        assert parquet.listing(root, "train").num_rows == files

    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "train/a")
        images.mkdir(parents=True)
        for number in range(files):
            row = pa.table({"image": [b"image"], "label": ["a"]})
            pq.write_table(row, f"{place}/{number:05d}.parquet")
            (images / f"{number:05d}.jpg").write_bytes(b"image")
        listing = folder.listing(place, "train")

        def read_images(root: str) -> None:
            assert sum(not row.error for row in folder.read(root, listing)) == files

        return {
            name: _calls_of(do, Bucket(place, latency_s=latency_s), files, latency_s)
            for name, do in (("parquet", list_parquet), ("images", read_images))
        }


def _calls_of(
    do: Callable[[str], None], bucket: Bucket, files: int, latency_s: float
) -> dict[str, float]:
    with as_bucket(bucket) as root:
        began = time.monotonic()
        with one_look():
            do(root)
        took = time.monotonic() - began
    calls = bucket.calls.total()
    return {
        "calls_per_file": round(calls / files, 2),
        "most_in_flight": bucket.most_in_flight,
        "sequential_over_measured": round(calls * latency_s / took, 1),
    }


def peak_mb() -> float:
    """Returns the peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@one_message
def main() -> None:
    """Measures each size in a process of its own, then prints a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = (325_000, 650_000, 1_300_000)
    parser.add_argument("--images", type=listed(count), default=sizes, help="sizes, with commas")
    parser.add_argument("--classes", type=count, default=1000, help="folders of each split")
    parser.add_argument("--files", type=count, default=500, help="files of the slow bucket")
    parser.add_argument("--latency-ms", type=count, default=20, help="more for each of its calls")
    parser.add_argument("--alone", action="store_true", help="one size, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.images[0], arguments.classes)))
        return
    found = []
    for images in sorted(arguments.images):
        command = [sys.executable, "-m", "benchmarks.scale", "--alone", "--images", str(images)]
        command += ["--classes", str(arguments.classes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        say(f"{images:,} images: {found[-1]['peak_mb']:,.0f} MB")
    table = Table("images", "MB")
    for each in found:
        table.add_row(f"{each['images']:,}", f"{each['peak_mb']:,.0f}")
    Console(stderr=True).print(table)
    first, last = found[0], found[-1]
    more = last["images"] - first["images"]
    slope = round((last["peak_mb"] - first["peak_mb"]) * 1e6 / more) if more else None
    calls = measure_calls(arguments.files, arguments.latency_ms / 1000)
    for name, each in calls.items():
        say(
            f"{name}: {each['calls_per_file']} calls a file, {each['most_in_flight']} at once, "
            f"{each['sequential_over_measured']} times as fast as one after the other"
        )
    memory = {"peak_mb": last["peak_mb"], "driver_bytes_per_row": slope, "sizes": found}
    print(json.dumps({**memory, "calls": calls}))


if __name__ == "__main__":
    main()
