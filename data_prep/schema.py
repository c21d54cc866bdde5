"""Records that leave this package: task and data settings, tasks, a prepared folder's manifest.

Holds no reading of images. A *class id* is the string that names one label of an image: a WordNet
id (`n02085620`) for ImageNet-like data, `outline/star` for procedural data, the label as text
otherwise. A classification task is an ordered list of class ids and is active in an image that
carries one of them (label: the first it carries); a segmentation task is active in an image that
carries its mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.checks import IGNORE as IGNORE
from data_prep.source_base import DataError as DataError
from data_prep.sources import AnySource
from data_prep.storage import join, read_bytes, write_bytes

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "holdout", "val")

TaskKind = Literal["classification", "segmentation"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(_Frozen):
    """One task of an experiment, as a config file states it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    kind: TaskKind = "classification"
    group: str | None = None  # classification: a group of imagenet_groups.yaml
    classes: tuple[str, ...] = ()  # classification: class ids, in label order
    indices: tuple[int | str, ...] = ()  # classification: ImageNet-1k indices, 151 or "151-268"
    classes_from: str | None = None  # classification: source that declares classes for this task
    exclude: tuple[str, ...] = ()  # class ids taken out again
    mask: str | None = None  # segmentation: mask key of the source, default the task's name
    labels: tuple[str, ...] = ()  # segmentation: names; position = value in the mask
    ignore: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()  # mask values never counted

    @field_validator("indices", mode="before")
    @classmethod
    def _one_range_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, int | str):
            return (value,)
        # Strict JSON takes a list for a tuple, but not from here on.
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_way_to_name_the_labels(self) -> TaskConfig:
        chosen = [
            key for key in ("group", "classes", "indices", "classes_from") if getattr(self, key)
        ]
        if self.kind == "segmentation":
            if chosen or self.exclude:
                raise ValueError(f"task '{self.name}' is a segmentation: it takes `labels` only")
            if not 2 <= len(self.labels) <= IGNORE:
                raise ValueError(f"task '{self.name}': give 2 to {IGNORE} mask `labels`")
            return self
        if self.labels or self.mask or self.ignore:
            raise ValueError(
                f"task '{self.name}' is a classification: `labels`, `mask` and `ignore` are a "
                "segmentation's; name its classes by group, classes, indices or classes_from"
            )
        if len(chosen) != 1:
            raise ValueError(
                f"task '{self.name}' needs exactly one of group, classes, indices, classes_from; "
                f"got {chosen or 'none'}"
            )
        return self

    @property
    def mask_name(self) -> str:
        """Key under which a source yields this task's mask."""
        return self.mask or self.name


class DataConfig(_Frozen):
    """Where images come from and what becomes of them on the way to a batch."""

    root: str = "."  # folder or URI that relative source paths start from
    sources: tuple[AnySource, ...] = Field(min_length=1)
    image_size: int | tuple[int, int] = 64  # px of a batch: one side, or [height, width]
    short_side: int | None = None  # px of the stored images' short side; default min(image_size)
    jpeg_quality: int = Field(default=90, ge=1, le=100)  # of images resized or converted
    max_bad_fraction: Fraction = 0.01  # share of unreadable images that is still accepted
    unassigned: Literal["drop", "keep"] = "drop"  # images of no task
    holdout_fraction: Fraction = 0.02  # share of the train rows never trained on (calibration)
    augmentation: Literal["none", "padded_crop", "random_resized_crop"] = "padded_crop"
    crop_padding: int = Field(default=4, ge=0)  # px, padded_crop
    min_crop_area: Fraction = 0.35  # share of the image, random_resized_crop
    flip: bool = True  # mirror half of the training images
    shard_bytes: int = Field(default=64 * 2**20, ge=1024)  # aim, bytes
    row_group_rows: int = Field(default=256, ge=1)  # rows read together
    shuffle_window_rows: int = Field(default=2048, ge=1)  # rows shuffled together in an epoch
    max_pixels: float = Field(default=64e6, gt=0)  # larger images are refused (bombs)
    train_rows: int | None = Field(default=None, ge=1)  # cap, for reduced runs; None is all
    val_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _sizes_and_names_fit(self) -> DataConfig:
        if min(self.size) < 8:
            raise ValueError(f"data.image_size is {self.image_size}; at least 8 px a side")
        if self.stored_short_side < min(self.size):
            raise ValueError(
                f"data.short_side is {self.short_side}, less than the short side of "
                f"data.image_size {self.image_size}: raise short_side or leave it out"
            )
        names = [source.source_name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.sources: two are called {twice[0]!r}; give each a `name`")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in a batch, px."""
        if isinstance(self.image_size, int):
            return (self.image_size, self.image_size)
        return self.image_size

    @property
    def stored_short_side(self) -> int:
        """Short side of the images in the shards, px."""
        return self.short_side or min(self.size)


@dataclass(frozen=True)
class Task:
    """A resolved task. `class_indices[i]`: global class index of label i; () for segmentation."""

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    class_indices: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class TaskTable:
    """All tasks of a run. `classes` is the union of their class ids by first appearance: the
    position there is the global class index. `masks[k]` and `ignored[k]` are the source's mask key
    and the mask values that mean "ignore" for task k ("" and () for classification)."""

    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    masks: tuple[str, ...]
    ignored: tuple[tuple[int, ...], ...]


class ShardInfo(_Frozen):
    path: str  # relative to the prepared folder
    rows: int
    bytes: int
    sha256: str
    row_group_rows: tuple[int, ...]


class SplitInfo(_Frozen):
    rows: int
    bytes: int
    shards: tuple[ShardInfo, ...]


class SourceInfo(_Frozen):
    """What one source gave: listed rows by split, before rejects."""

    name: str
    kind: str
    rows: dict[str, int]


class Manifest(_Frozen):
    """Contents of a prepared folder, written last: a folder without one is not finished.

    `single_class`: every row has exactly one class id of `classes`. Splits are `train`, `holdout`
    (train rows kept out of training) and `val`; those not asked for are absent. `fingerprint` is
    the sha256 over the shards' hashes and the tasks."""

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

    def split(self, name: str) -> SplitInfo:
        """The split of that name; DataError if the folder holds none."""
        if name not in self.splits:
            raise DataError(f"no split '{name}' was prepared; there are {sorted(self.splits)}")
        return self.splits[name]


def read_manifest(folder: str) -> Manifest:
    """Manifest of a prepared folder or URI; DataError if it is missing or of another format."""
    try:
        text = read_bytes(join(folder, MANIFEST_NAME))
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}: it is not a prepared folder or was interrupted; "
            "prepare the data again"
        ) from None
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder} has format {version}, this version reads {FORMAT_VERSION}: "
                "prepare the data again"
            )
        return Manifest.model_validate_json(text)
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        raise DataError(f"{folder}/{MANIFEST_NAME} is damaged: {error}") from error


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write atomically; to be called when every shard is in place."""
    write_bytes(join(folder, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())


def task_names(tasks: Sequence[Task], kind: TaskKind) -> tuple[str, ...]:
    """Names of the tasks of one kind, in order."""
    return tuple(task.name for task in tasks if task.kind == kind)
