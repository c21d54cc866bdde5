"""Measures the memory that `mantis prepare` takes on the driver for a made-up folder of images.

    python -m benchmarks.scale --images 325000,650000,1300000 --classes 1000

No image exists: the folder's listing, what the tasks that read images return and what the tasks
that write shards return are made up, with names, hashes and labels as those of a folder of classes.
All that the driver does with them is real: listing, pieces, index, hold-out, order, plans,
manifest. Each size is a process of its own. `rss_mb` is its peak resident memory without what it
had before; `bytes_per_row` is the slope between the smallest and the largest size. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
from pyarrow import fs
from rich.console import Console
from rich.table import Table

from benchmarks.program import count, listed, one_message, say
from data_prep.config import DataConfig, TaskConfig
from data_prep.manifest import ShardInfo
from data_prep.prepare.shards import prepare, write_shard
from data_prep.prepare.staging import Job, index_schema, order_key, row_labels
from data_prep.sources import folder as folder_source
from data_prep.sources.folder import ImageFolder
from data_prep.storage import Found
from data_prep.tasks import resolve_tasks

IMAGE_BYTES = 20_000
VAL_SHARE = 26  # one val image to so many training images, as ImageNet-1k has


def measure(images: int, classes: int) -> dict[str, float]:
    """Prepares `images` made-up images in this process; returns its memory (MB) and rows."""
    make_up(images, classes)
    names = [f"n{number:08d}" for number in range(classes)]
    data = DataConfig(root="made-up", sources=(ImageFolder(kind="image_folder"),), image_size=224)
    table = resolve_tasks((TaskConfig(name="all", classes=tuple(names)),), data)
    before = peak_mb()
    with tempfile.TemporaryDirectory() as output:
        manifest = prepare(data, table, seed=0, output=output, run=made_up_run)
    rows = sum(split.rows for split in manifest.splits.values())
    return {"images": rows, "rss_mb": round(peak_mb() - before, 1)}


def make_up(images: int, classes: int) -> None:
    """Puts a made-up folder in the place of the file system's, for sources of class folders."""
    names = [f"n{number:08d}" for number in range(classes)]

    def files_of_each(where: str, folders: list[str]) -> Iterator[list[Found]]:
        of_split = images // VAL_SHARE if where.endswith("val") else images - images // VAL_SHARE
        for number, name in enumerate(folders):
            own = of_split // classes + (number < of_split % classes)
            yield [Found(f"{name}_{index}.JPEG", IMAGE_BYTES, True) for index in range(own)]

    made_up: dict[str, Callable[..., object]] = {
        "folders_in": lambda where: names,
        "files_of_each": files_of_each,
        "files_below": lambda where, recursive=True: [],
        "kind_of": lambda where: fs.FileType.Directory,
    }
    for name, function in made_up.items():
        setattr(folder_source, name, function)


def made_up_run(
    tables: Sequence[pa.Table], function: Callable[..., pa.Table], job: Job
) -> Iterable[pa.Table]:
    """Stands for the Ray tasks of `prepare`: returns what they would. Reads and writes nothing."""
    return map(_written if function is write_shard else lambda piece: _staged(piece, job), tables)


def _staged(piece: pa.Table, job: Job) -> pa.Table:
    """Returns the index of a piece, as stage_piece does."""
    part, rows = f"staging/{piece['piece'][0].as_py():06d}.bin", []
    columns = piece.select(["source", "source_id", "split", "class_ids"]).to_pylist()
    for number, row in enumerate(columns):
        content = hashlib.sha256(row["source_id"].encode()).digest()
        labels = row_labels(row.pop("class_ids"), [], job.table)
        rows.append(
            row
            | {
                "key": order_key(job.seed, content, row["source"], row["source_id"]),
                "content": content,
                "part": part,
                "offset": number * IMAGE_BYTES,
                "sizes": [IMAGE_BYTES],
                "class_indices": labels.class_indices,
                "labels": labels.labels,
                "task_mask": labels.task_mask,
                "reason": None,
                "mistake": None,
            }
        )
    return pa.Table.from_pylist(rows, schema=index_schema(len(job.table.tasks)))


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
        say(f"{images:,} images: {found[-1]['rss_mb']:,.0f} MB")
    table = Table("images", "MB")
    for each in found:
        table.add_row(f"{each['images']:,}", f"{each['rss_mb']:,.0f}")
    Console(stderr=True).print(table)
    first, last = found[0], found[-1]
    more = last["images"] - first["images"]
    slope = round((last["rss_mb"] - first["rss_mb"]) * 1e6 / more) if more else None
    print(json.dumps({"peak_mb": last["rss_mb"], "bytes_per_row": slope, "sizes": found}))


if __name__ == "__main__":
    main()
