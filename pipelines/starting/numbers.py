"""Chooses the numbers of a first config from the number of images, their size and the machine.

The teacher's numbers for 400 photographs were tried (results/LOG.md). The others follow from the
number of steps and are not tuned. Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass

VAL_FRACTION = 0.2
MOST_VAL = 10_000
"""Images to measure on. With so many, top1 has a standard error of half a point."""
HELD_OF_A_CLASS = 5
"""Held-back images for each class. They are drawn from all, so that few would miss some classes."""
MOST_CACHED = 10 * 2**30
"""Bytes of decoded images up to which a config keeps them on disk: half of what may lie there."""
MOST_LISTED = 100  # classes written one by one; more are `all`


@dataclass(frozen=True)
class Row:
    """A schedule for up to so many training images."""

    images: float
    batch_size: int
    teacher_epochs: int
    stage1_epochs: int
    stage2_epochs: int


ROWS = (
    Row(100, 8, 30, 30, 30),
    Row(1_000, 16, 40, 30, 15),
    Row(5_000, 32, 30, 20, 10),
    Row(20_000, 64, 25, 16, 8),
    Row(100_000, 128, 20, 12, 6),
    Row(float("inf"), 256, 12, 8, 4),
)
"""Fewer images need smaller batches and more epochs, so that a training has some hundred steps."""


@dataclass(frozen=True)
class Machine:
    """What a config is chosen for: CPU cores, GPUs, and whether torchvision's weights are there."""

    cpus: int
    gpus: int
    pretrained: bool


@dataclass(frozen=True)
class Numbers:
    """The numbers of a first config. Rows are images; `*_epochs` are epochs."""

    image_size: int
    val_fraction: float | None
    val_cap: int | None
    holdout_fraction: float
    train_rows: int
    val_rows: int
    batch_size: int
    teacher_lr: float
    teacher_epochs: int
    stage1_epochs: int
    stage2_epochs: int
    pretrained: bool
    gpus: int

    @property
    def cached(self) -> bool:
        """Whether the decoded images are few enough to be kept on disk."""
        return 3 * self.image_size**2 * self.train_rows <= MOST_CACHED

    @property
    def steps(self) -> tuple[int, int, int]:
        """The optimiser steps of teacher, stage 1 and stage 2."""
        each = self.train_rows // self.batch_size
        return each * self.teacher_epochs, each * self.stage1_epochs, each * self.stage2_epochs


def choose(
    train_images: int, val_images: int, short_side: int, classes: int, machine: Machine
) -> Numbers:
    """Returns the numbers for so many images of this median short side (px) on a machine."""
    fraction = None if val_images else min(VAL_FRACTION, rounded(MOST_VAL / train_images))
    val = val_images or round((fraction or 0) * train_images)
    left = train_images if val_images else train_images - val
    held = min(
        max(16, HELD_OF_A_CLASS * classes, round(0.05 * left)), 2_000, max(1, round(0.15 * left))
    )
    rows = left - held
    row = next(row for row in ROWS if rows <= row.images)
    batch = min(row.batch_size, max(2, rows))
    return Numbers(
        image_size=image_size(short_side, machine),
        val_fraction=fraction,
        val_cap=MOST_VAL if val_images > MOST_VAL else None,
        holdout_fraction=rounded(held / left),
        train_rows=rows,
        val_rows=min(val, MOST_VAL),
        batch_size=batch,
        teacher_lr=0.01 if machine.pretrained else teacher_lr(batch),
        teacher_epochs=row.teacher_epochs,
        stage1_epochs=row.stage1_epochs,
        stage2_epochs=row.stage2_epochs,
        pretrained=machine.pretrained,
        gpus=machine.gpus,
    )


def image_size(short_side: int, machine: Machine) -> int:
    """Returns a side in pixels: up to 128 on a GPU, up to 64 on CPUs, not beyond the photos."""
    sizes = (128, 96, 64, 48, 32) if machine.gpus else (64, 48, 32)
    return next((size for size in sizes if size <= short_side), sizes[-1])


def teacher_lr(batch_size: int) -> float:
    """Returns the peak rate of SGD: 0.05 at 16 images a step, in proportion, 0.1 at most."""
    return min(0.1, rounded(0.05 * batch_size / 16))


def rounded(value: float) -> float:
    """Returns a number with two significant digits, to be read by people."""
    return float(f"{value:.2g}")
