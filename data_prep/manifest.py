"""What a prepared folder records about itself: tasks, splits, shards, sources.

Holds no settings and reads no images. `Task` and `TaskTable` stand here because the manifest
records them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

from data_prep.errors import DataError
from data_prep.storage import absolute, join, read_bytes, write_bytes

FORMAT_VERSION = 2
READABLE = (1, 2)
"""Formats that are read. Version 2 stores images as WebP, where version 1 had JPEG and PNG."""
RETIRED = ("class_counts", "task_counts")
"""Fields that folders of earlier code still have; nothing read them."""
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "holdout", "val")

TaskKind = Literal["classification", "segmentation"]


@dataclass(frozen=True)
class Task:
    """A resolved task.

    `class_indices[i]` is the global class index of label i; it is () for a segmentation. `parent`
    is the name of the task whose label of this task's name admits it, "" for none.
    """

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    class_indices: tuple[int, ...]
    num_classes: int
    parent: str = ""


@dataclass(frozen=True)
class TaskTable:
    """All tasks of a run, resolved.

    `classes` is the union of their class ids, in the order in which the tasks name them first: a
    position there is a global class index. `masks[k]` is the source's mask key of task k,
    `ignored[k]` the mask values that count nowhere; both are empty for a classification.
    """

    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    masks: tuple[str, ...]
    ignored: tuple[tuple[int, ...], ...]


class ShardInfo(BaseModel, frozen=True, extra="forbid"):
    """One Parquet file of a split; `sha256` is that of the whole file."""

    path: str  # relative to the prepared folder
    rows: int
    bytes: int
    sha256: str
    row_group_rows: tuple[int, ...]


class SplitInfo(BaseModel, frozen=True, extra="forbid"):
    """One split: its shards in order, their rows and bytes together."""

    rows: int
    bytes: int
    shards: tuple[ShardInfo, ...]


class SourceInfo(BaseModel, frozen=True, extra="forbid"):
    """One source: the rows it listed by split, before unreadable images were left out."""

    name: str
    kind: str
    rows: dict[str, int]


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """Contents of a prepared folder. It is written last: a folder without one is not finished.

    `single_class` is true where rows count as having one class id of `classes` each, by
    `data.single_class`; a row of none or several has the class label -1. Splits are `train`,
    `holdout` (train rows kept out of training) and `val`; those not asked for are absent.
    `fingerprint` is the sha256 over the shards' hashes and the tasks. `remarks` are sentences on
    what the set lacks or holds twice.
    """

    format_version: int = FORMAT_VERSION
    image_size: tuple[int, int]  # height, width
    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    single_class: bool
    seed: int
    splits: dict[str, SplitInfo]
    unassigned: dict[str, int]  # split -> rows of no task, kept or dropped
    rejected: int  # unreadable images, listed in rejected.parquet
    fingerprint: str
    sources: tuple[SourceInfo, ...]
    remarks: tuple[str, ...] = ()

    def split(self, name: str) -> SplitInfo:
        """Returns the split of that name. Raises DataError where the folder holds none."""
        if name not in self.splits:
            raise DataError(f"no split '{name}' was prepared; there are {sorted(self.splits)}")
        return self.splits[name]


def read_manifest(folder: str) -> Manifest:
    """Reads the manifest of a prepared folder or URI.

    Raises DataError where it is missing, damaged or of another format.
    """
    try:
        text = read_bytes(join(absolute(folder), MANIFEST_NAME))
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}: it is no prepared folder, or preparing it was "
            "interrupted; prepare the data again"
        ) from None
    try:
        record = json.loads(text)
        version = record.get("format_version")
        if version not in READABLE:
            raise DataError(
                f"{folder} has format {version}, and this version reads 1 and 2: "
                "prepare the data again"
            )
        kept = {name: value for name, value in record.items() if name not in RETIRED}
        return Manifest.model_validate_json(json.dumps(kept))
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        wrong = f"{error}".partition("For further information")[0]
        raise DataError(
            f"{folder}/{MANIFEST_NAME} is damaged ({' '.join(wrong.split())}): prepare the data "
            "again"
        ) from error


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Writes the manifest atomically. Every shard must be in place before."""
    write_bytes(join(folder, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())


def task_names(tasks: Sequence[Task], kind: TaskKind) -> tuple[str, ...]:
    """Returns the names of the tasks of one kind, in order."""
    return tuple(task.name for task in tasks if task.kind == kind)
