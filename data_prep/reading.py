"""The settings that shape batches in training. Knows no sources and no preparing.

A prepared folder depends on none of them: one folder serves trainings that augment differently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Augmentation = Literal["none", "padded_crop", "random_resized_crop"]
Cache = Literal["none", "decoded"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ReadingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How rows of a prepared folder become training batches; part of `data` in a config file."""

    augmentation: Augmentation = "padded_crop"
    """How a training image is cropped. `padded_crop` shifts it by up to `crop_padding` pixels,
    which suits small images of centred objects. `random_resized_crop` enlarges a part of at
    least `min_crop_area`, the usual choice for ImageNet. `none` takes a random window without
    padding where the stored image is larger than `image_size`. Evaluation always takes the
    central crop."""
    crop_padding: int = Field(default=4, ge=0)
    """Pixels by which `padded_crop` extends each edge by reflection before it crops. The
    default is the customary one for small images such as CIFAR's."""
    min_crop_area: Fraction = 0.35
    """Smallest part that `random_resized_crop` cuts out, as a share of the image's area. The
    default keeps more than ImageNet's usual 0.08, because small images lose their object in a
    smaller part."""
    flip: bool = True
    """Whether half of the training images are mirrored left to right. Turn it off where
    mirroring changes a label, as for letters."""
    cache: Cache = "none"
    """Whether training images are decoded once and kept on the disk of each machine that trains.
    `decoded` spares most of the work of an epoch and changes no batch; it takes 3 bytes a pixel.
    They lie in `mantis/decoded` below XDG_CACHE_HOME or ~/.cache. `none` decodes in every epoch."""
    cache_gib: float = Field(default=20.0, gt=0)
    """Most GiB that decoded images take on a machine, of all experiments together. Those that were
    not used for longest are removed; a set that has more by itself is decoded in every epoch."""
    shuffle_window_rows: int = Field(default=2048, ge=1)
    """Rows that are shuffled together in an epoch. Row groups are read in random order until
    they hold this many rows, or 512 MiB. More rows mix better and take more memory in each
    reader; the default is eight row groups of the default size."""


def reading_field(name: str) -> Any:
    """Returns a field of ReadingConfig, for another config to declare it as its own."""
    return ReadingConfig.model_fields[name]
