"""The sections `tasks` and `data` of a config file. Reads no images.

A *class id* is the string that names one label of an image: a WordNet id (`n02085620`) for
ImageNet-like data, `outline/star` for procedural data, the label as text otherwise. A
classification task is an ordered list of class ids; it is active in an image that carries one of
them, and the first one carried is the label. A segmentation task is active in an image that carries
its mask.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from data_prep.checks import IGNORE, StoredFormat
from data_prep.manifest import TaskKind
from data_prep.reading import Augmentation, Cache, Fraction, ReadingConfig, reading_field
from data_prep.sources.base import class_id_of
from data_prep.sources.kinds import AnySource
from mantis_core.pixels import MAX_PIXELS


class TaskConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One task of an experiment, as a config file states it.

    A classification names its classes by exactly one of `group`, `classes`, `indices` and
    `classes_from`. A segmentation names its `labels`.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)
    """Name of the task in metrics, reports and answers: lower-case letters, digits and
    underscores, starting with a letter. At most 100, since names of metrics hold it."""
    kind: TaskKind = "classification"
    """What the task answers: one class for the image, or one label for each pixel."""
    group: str | None = None
    """Classification: a group of ImageNet-1k classes that ships in
    `data_prep/imagenet_groups.yaml`, such as `dogs`."""
    classes: tuple[str, ...] | Literal["all", "rest"] = ()
    """Classification: class ids, in the order of the labels. `all` takes every class id that the
    sources hold, sorted; another class folder is then another set of classes. `rest` takes all
    classes of ImageNet-1k that no other task has, in ImageNet's order; one task may have it."""
    indices: tuple[int | str, ...] = ()
    """Classification: ImageNet-1k indices from 0 to 999, as numbers (`151`) or ranges that
    include both ends (`"151-268"`)."""
    classes_from: str | None = None
    """Classification: name of a source. It gives the classes that it declares for a task of this
    name, as `shapes` does, or else every class id that it holds."""
    exclude: tuple[str, ...] = ()
    """Classification: class ids to take out of those named."""
    parent: str | None = None
    """Name of another classification, one of whose labels is named as this task. Where both are
    asked for or detected, the server answers this task only if the answer to that one is that
    label: `group` may say `dogs`, and only then `dogs` says which."""
    mask: str | None = None
    """Segmentation: key of the mask in the source. Left out, it is the task's name."""
    labels: tuple[str, ...] = ()
    """Segmentation: names of the labels. The position of a name is its value in the mask."""
    ignore: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()
    """Segmentation: mask values that count neither in the loss nor in a metric. 255 never
    counts."""

    @field_validator("indices", mode="before")
    @classmethod
    def _one_range_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, int | str):
            return (value,)
        # Strict JSON takes a list for a tuple, but not from here on.
        return tuple(value) if isinstance(value, list) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _numbers_are_class_ids(cls, value: Any) -> Any:
        if value in ("all", "rest"):
            return value
        labels = tuple(value) if isinstance(value, list | tuple) else (value, None)
        if not all(isinstance(each, str | bool | int | float) for each in labels):
            raise ValueError(f"got {value!r}; give a list of class ids, `all` or `rest`")
        return tuple(class_id_of(each) for each in labels)

    @model_validator(mode="after")
    def _one_way_to_name_the_labels(self) -> TaskConfig:
        chosen = [
            key for key in ("group", "classes", "indices", "classes_from") if getattr(self, key)
        ]
        if self.kind == "segmentation":
            if chosen or self.exclude:
                raise ValueError(
                    f"task '{self.name}' is a segmentation and takes `labels` only; "
                    f"remove {', '.join(chosen or ['exclude'])}"
                )
            if not 2 <= len(self.labels) <= IGNORE:
                raise ValueError(
                    f"task '{self.name}' has {len(self.labels)} `labels`; give 2 to {IGNORE}"
                )
            return self
        if self.labels or self.mask or self.ignore:
            raise ValueError(
                f"task '{self.name}' is a classification: `labels`, `mask` and `ignore` belong to "
                "a segmentation; name its classes by group, classes, indices or classes_from"
            )
        if len(chosen) != 1:
            raise ValueError(
                f"task '{self.name}' needs exactly one of group, classes, indices, classes_from; "
                f"got {', '.join(chosen) or 'none'}"
            )
        return self

    @property
    def mask_name(self) -> str:
        """Key under which a source yields this task's mask."""
        return self.mask or self.name


class DataConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where images come from and what becomes of them on the way to a batch."""

    root: str = "."
    """Folder or URI that relative paths of sources start from. A relative folder starts from
    the one in which the command is started."""
    sources: tuple[AnySource, ...] = Field(min_length=1)
    """Sources of images and labels, in the order in which they are listed. Each `kind` has keys
    of its own."""
    image_size: int | tuple[int, int] = 64
    """Size of the images in a batch in pixels: one side of a square, or [height, width]; at
    least 8 a side."""
    short_side: int | None = None
    """Short side of the stored images in pixels. Left out, it is the shorter side of
    `image_size`, which stores the least; a larger one leaves room for random crops."""
    stored_format: StoredFormat = "webp"
    """How images are stored that must be resized or converted; others keep their bytes. `webp`
    is lossless, so that a codec is trained on the pixels that its client will see. `jpeg` takes
    about half of the bytes and of the time to decode, and alters the pixels. Images with masks
    are always stored without loss."""
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of the stored images where `stored_format` is `jpeg`. A quality of 95 or more
    keeps the difference to the client's pixels small."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable images up to which preparing goes on; a single one never ends it, unless
    this is 0. The default forgives the few damaged files of large public sets and stops at a wrong
    path or format."""
    unassigned: Literal["drop", "keep"] = "drop"
    """What becomes of images of no task. They are counted either way; the default saves their
    bytes."""
    single_class: Literal["auto"] | bool = "auto"
    """Whether images count as showing one class each. The joint decision over the classes of all
    tasks, a detector that names classes, a teacher with one head and the baseline `student` need
    it. `auto` means yes if every image carries exactly one class of the tasks. `true` means yes
    also if some carry none or several; those have no part in that decision. `false` means no."""
    val_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the images that becomes the val split where no source has one: this share of each
    class, and at least one image of a class that has two. A hash of each image's content chooses,
    so equal images stand on one side, and a copy of the data is split alike. Left out, the sources
    need a val split of their own."""
    holdout_fraction: Fraction = 0.02
    """Share of the training rows that is never trained on, to choose checkpoints and calibrate
    on. More than 0, because both need some rows. The default leaves nearly all to training."""
    augmentation: Augmentation = reading_field("augmentation")
    crop_padding: int = reading_field("crop_padding")
    min_crop_area: Fraction = reading_field("min_crop_area")
    flip: bool = reading_field("flip")
    cache: Cache = reading_field("cache")
    cache_gib: float = reading_field("cache_gib")
    shard_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Size to aim at for one shard, in bytes. One task holds one shard in memory while it
    writes; the default of 64 MiB keeps both that and the number of files low."""
    row_group_rows: int = Field(default=256, ge=1)
    """Rows of a shard that are read together. Smaller groups shuffle better, larger ones read
    faster from an object store."""
    shuffle_window_rows: int = reading_field("shuffle_window_rows")
    max_pixels: float = Field(default=MAX_PIXELS, gt=0)
    """Images of more pixels than this are refused before they are decoded. What counts of a large
    JPEG is the size to which its decoder reduces it. The default admits the photographs of most
    cameras and refuses decompression bombs; images of more than 178 million pixels are always
    refused."""
    train_rows: int | None = Field(default=None, ge=1)
    """Rows of the train split to take at most, the holdout included, chosen by the seed. For
    reduced runs; left out, all are taken."""
    val_rows: int | None = Field(default=None, ge=1)
    """Rows of the val split to take at most, chosen by the seed. Left out, all are taken."""
    revision: str = ""
    """A word for the state of the sources, which enters the key of `prepare`. Change it if images
    were replaced by others of the same names and sizes: labels and small folders are compared by
    content, the images of Parquet files and of large folders are not."""

    @model_validator(mode="after")
    def _sizes_and_names_fit(self) -> DataConfig:
        if min(self.size) < 8:
            raise ValueError(f"data.image_size is {self.image_size}; give at least 8 px a side")
        if self.stored_short_side < min(self.size):
            raise ValueError(
                f"data.short_side is {self.short_side}, less than the short side of "
                f"data.image_size {self.image_size}: raise short_side or leave it out"
            )
        if not 0 < self.holdout_fraction < 1:
            raise ValueError(
                f"data.holdout_fraction is {self.holdout_fraction:g}; give more than 0 and less "
                "than 1: the images that it holds back choose the best epoch and the threshold of "
                "the mask, and the others are trained on"
            )
        if self.flip and (others := [s for s in self.sources if not s.may_be_mirrored]):
            raise ValueError(
                "data.flip mirrors training images, which changes labels of the source "
                f"'{others[0].source_name}': set data.flip to false"
            )
        names = [source.source_name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.sources: two are called {twice[0]!r}; give each a `name`")
        return self

    @property
    def reading(self) -> ReadingConfig:
        """The fields that shape batches in training."""
        return ReadingConfig(**{name: getattr(self, name) for name in ReadingConfig.model_fields})

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
