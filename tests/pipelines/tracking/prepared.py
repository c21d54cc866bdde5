"""The manifest of a small prepared folder, without its shards."""

from __future__ import annotations

from data_prep.manifest import Manifest, ShardInfo, SourceInfo, SplitInfo, Task

ROWS = {"train": 24, "holdout": 6, "val": 9}


def split(name: str, rows: int) -> SplitInfo:
    shard = ShardInfo(
        path=f"{name}-0.parquet",
        rows=rows,
        bytes=1000,
        sha256=f"sha of {rows} {name}",
        row_group_rows=(rows,),
    )
    return SplitInfo(rows=rows, bytes=1000, shards=(shard,))


def manifest(**rows: int) -> Manifest:
    return Manifest(
        image_size=(32, 48),
        tasks=(
            Task("pets", "classification", ("cat", "dog"), (0, 1), 2),
            Task("road", "segmentation", (), (), 3),
        ),
        classes=("cat", "dog"),
        class_names=("cat", "dog"),
        single_class=True,
        seed=0,
        splits={name: split(name, count) for name, count in {**ROWS, **rows}.items()},
        unassigned={"val": 2},
        rejected=1,
        fingerprint="f" * 64,
        sources=(SourceInfo(name="photos", kind="folder", rows={"train": 30, "val": 9}),),
    )
