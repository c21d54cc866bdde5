"""Writes the text of a first config: YAML with a comment on each choice."""

from __future__ import annotations

import json
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.starting.found import Found
from pipelines.starting.minutes import Estimate
from pipelines.starting.numbers import MOST_LISTED, Numbers
from pipelines.starting.reading import SPLIT_WORDS, some

TEACHER = "resnet18"
WIDTH = 100
CHECKPOINT_EVERY_S = 30
PLAIN = re.compile(r"[A-Za-z][A-Za-z_/-]*( [A-Za-z_-]+)*")
RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan"}


def document(
    found: Found, numbers: Numbers, took: Estimate | None, *, output: Path, command: str
) -> str:
    """Returns the text of a config that runs as it stands. `command` is what has made it."""
    parts = [_head(found, took, output, command), _data(found, numbers), _tasks(found)]
    return "\n".join([*parts, _trainings(numbers), _rest(numbers)])


def task_name(folder: Path) -> str:
    """Returns the name of a folder as a task may be called, `images` if nothing is left of it."""
    return _task(folder.resolve().name) or "images"


def tasks_of(found: Found) -> dict[str, tuple[str, ...]]:
    """Returns the proposed tasks and their classes: those that the data names, else one of all."""
    named = {_task(name): ids for name, ids in found.groups.items()}
    if len(named) > 1 and "" not in named and len(named) == len(found.groups):
        return named
    return {_task(_stem(found)) or "images": found.classes}


def scalar(value: Any) -> str:
    """Returns a value in YAML, on one line. Text is quoted unless it can be nothing but text."""
    if isinstance(value, str):
        plain = PLAIN.fullmatch(value) and value.lower() not in RESERVED
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(scalar, value))}]"
    return json.dumps(value)


def _head(found: Found, took: Estimate | None, output: Path, command: str) -> str:
    images = f"{found.train_images:,} images"
    if found.val_images:
        images = f"{found.train_images:,} images for training and {found.val_images:,} for val"
    counts = sorted(found.counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"Made by `{command}`. Change any line; what is left out has a default.",
        f"  mantis run --config {output} --dry-run    the plan and its steps, runs nothing",
        f"  mantis run --config {output}",
        f"Found: {found.reading.what}; {images} of {len(counts)} classes "
        f"({some(f'{name} {count}' for name, count in counts)}),",
        f"about {found.short_side} pixels on the short side.",
        *(f"Note: {note}." for note in found.notes),
    ]
    if took is not None:
        lines.append(f"Expected: {minutes_text(took.minutes)}, {took.how}.")
    wrapped = (
        textwrap.fill(
            line,
            WIDTH,
            initial_indent="# ",
            subsequent_indent="# ",
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
        for line in lines
    )
    return "".join(f"{each}\n" for each in wrapped)


def minutes_text(minutes: float) -> str:
    """Returns a duration with no more digits than an estimate has."""
    if minutes < 1.5:
        return "about a minute"
    if minutes < 90:
        return f"about {round(minutes)} minutes"
    hours = minutes / 60
    return f"about {hours:.0f} hours" if hours < 48 else f"about {hours / 24:.0f} days"


def _data(found: Found, numbers: Numbers) -> str:
    source = ", ".join(f"{name}: {scalar(value)}" for name, value in found.reading.source.items())
    lines = [
        "data:",
        f"  root: {scalar(str(found.reading.root))}",
        "  sources:",
        f"    - {{{source}}}",
    ]
    if numbers.val_fraction is not None:
        lines.append(
            f"  val_fraction: {numbers.val_fraction}    # of each class, to measure on, chosen by "
            "the images' content"
        )
    if numbers.val_cap is not None:
        lines.append(f"  val_rows: {numbers.val_cap}    # enough to measure on")
    lines += [
        f"  image_size: {numbers.image_size}    # pixels: each image is resized and cropped to it",
        "  augmentation: random_resized_crop    # training sees another part of an image each time",
        f"  holdout_fraction: {numbers.holdout_fraction}    # of the training images, to choose "
        "epochs on",
    ]
    if numbers.cached:
        lines.append(
            "  cache: decoded    # images are decoded once and kept on this machine's disk"
        )
    return "\n".join(lines) + "\n"


def _tasks(found: Found) -> str:
    lines = ["tasks:    # questions with fixed answers; docs/guide/data.md says what else there is"]
    for name, classes in tasks_of(found).items():
        listed: Any = list(classes)
        if len(classes) > MOST_LISTED and not found.groups:
            listed = "all"
        lines.append(f"  - {{name: {name}, classes: {scalar(listed)}}}")
    return "\n".join(lines) + "\n"


def _trainings(numbers: Numbers) -> str:
    steps = dict(zip(("teacher", "stage1", "stage2"), numbers.steps, strict=True))
    why = (
        "# begins with torchvision's weights for ImageNet, whose licence is its own"
        if numbers.pretrained
        else "# from random weights: torchvision's are not on this machine and not to be reached."
        "\n# With a network, `start: pretrained` after `weights: train` gives a better teacher."
    )
    batch = f"batch_size: {numbers.batch_size}"
    return "\n".join(
        [
            why,
            "teacher:",
            f"  name: {TEACHER}",
            "  weights: train",
            *(["  start: pretrained"] if numbers.pretrained else []),
            f"  training:    # {steps['teacher']:,} steps",
            f"    epochs: {numbers.teacher_epochs}",
            f"    {batch}",
            f"    optim: {{kind: sgd, lr: {numbers.teacher_lr}, weight_decay: 0.0005}}",
            "    ema_decay: 0",
            f"stage1: {{epochs: {numbers.stage1_epochs}, {batch}}}    # {steps['stage1']:,} steps",
            f"stage2: {{epochs: {numbers.stage2_epochs}, {batch}}}    # {steps['stage2']:,} steps; "
            "a larger rate_weight makes smaller streams",
            "",
        ]
    )


def _rest(numbers: Numbers) -> str:
    gpus = "  gpus_per_worker: 1    # one of the GPUs here\n" if numbers.gpus else ""
    return (
        "evaluate:\n"
        "  baselines: [oracle, teacher]    # the codec with the true tasks given; no codec at all\n"
        "  codecs: {webp: [0, 50]}    # WebP files in front of the teacher\n"
        "\ncluster:\n"
        f"  checkpoint_every_s: {CHECKPOINT_EVERY_S}    # fewer where "
        "epochs are short\n"
        f"{gpus}"
    )


def _stem(found: Found) -> str:
    """Returns the name of what was looked at: the folder, or the files' common name."""
    train = found.reading.source.get("train")
    if found.reading.source["kind"] == "image_folder" or not isinstance(train, str):
        return found.reading.root.resolve().name
    stem = re.sub(r"[^a-z0-9]+", " ", Path(train).stem.lower())
    words = [word for word in stem.split() if word not in (*SPLIT_WORDS, "data", "of")]
    name = " ".join(word for word in words if not word.isdigit())
    return name or found.reading.root.resolve().name


def _task(name: str) -> str:
    """Returns a name in lower-case letters, digits and underscores, beginning with a letter."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_").lstrip("0123456789_")[:100]
