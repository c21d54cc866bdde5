"""The command that writes a first config: init."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.errors import MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import AsJson

if TYPE_CHECKING:
    from pipelines.starting.found import Found
    from pipelines.starting.minutes import Estimate
    from pipelines.starting.numbers import Numbers

LONG_MINUTES = 180  # from which on a shorter try is proposed
TRY_ROWS = 20_000


@ending_well
def init(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Folder of images, or Parquet files or tars of one data set.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Config file to write.")] = Path(
        "my.yaml"
    ),
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="NAME",
            help="Label file of a folder, column of labels of Parquet files, or suffix of the "
            "labels in tars, if several fit.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the config file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of images and write a config for it.

    Proposes tasks, sizes and schedules. Times a few training steps to say how long a run takes.
    Trains and downloads nothing.

    Example: mantis init photos
    """
    if output.exists() and not force:
        raise Stopped(
            f"error: {output} exists: give another file with -o, or --force to overwrite it",
            MISTAKE,
        )
    from pipelines.starting.document import TEACHER, document
    from pipelines.starting.found import look
    from pipelines.starting.machine import this_machine
    from pipelines.starting.minutes import estimate
    from pipelines.starting.numbers import choose

    found = look(paths, labels)
    machine = this_machine(TEACHER)
    numbers = choose(
        found.train_images, found.val_images, found.short_side, len(found.counts), machine
    )
    took = estimate(numbers, TEACHER, len(found.counts), machine.cpus)
    words = ["mantis", "init", *map(str, paths), *(["--labels", labels] if labels else [])]
    text = document(found, numbers, took, output=output, command=shlex.join(words))
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Stopped(f"error: {output} cannot be written: {error.strerror}", MISTAKE) from None
    run = shlex.join(["mantis", "run", "--config", str(output)])
    if as_json:
        print_json(_as_json(found, numbers, took, output, run))
        return
    for line in _as_text(found, numbers, took, output, run):
        typer.echo(line)


COMMANDS = (init,)


def _as_json(
    found: Found, numbers: Numbers, took: Estimate, output: Path, run: str
) -> dict[str, Any]:
    from pipelines.starting.document import tasks_of

    return {
        "config": str(output),
        "layout": found.reading.what,
        "images": {"train": found.train_images, "val": found.val_images},
        "classes": dict(sorted(found.counts.items())),
        "tasks": {name: list(classes) for name, classes in tasks_of(found).items()},
        "image_size": numbers.image_size,
        "steps": dict(zip(("teacher", "stage1", "stage2"), numbers.steps, strict=True)),
        "gpus_per_worker": min(1, numbers.gpus),
        "pretrained": numbers.pretrained,
        "minutes": round(took.minutes, 1),
        "notes": list(found.notes),
        "next": run,
    }


def _as_text(
    found: Found, numbers: Numbers, took: Estimate, output: Path, run: str
) -> Iterator[str]:
    """Yields lines on what was found and chosen, and the next command."""
    from pipelines.starting.document import TEACHER, minutes_text, tasks_of

    val = f", {found.val_images:,} more for val" if found.val_images else ""
    yield (
        f"found: {found.reading.what}, {found.train_images:,} images of {len(found.counts)} "
        f"classes{val}"
    )
    yield from (f"note: {note}" for note in found.notes)
    asked = (f"{name} ({len(classes)} classes)" for name, classes in tasks_of(found).items())
    yield f"tasks: {', '.join(asked)}"
    if numbers.val_fraction is not None:
        yield f"val: {numbers.val_fraction:.2g} of the images, chosen by their content"
    steps = ", ".join(f"{count:,}" for count in numbers.steps)
    yield (
        f"training: {numbers.image_size} px, {steps} steps of {numbers.batch_size} images for "
        f"teacher, stage 1 and stage 2, on {'a GPU' if numbers.gpus else 'the CPU'}"
    )
    start = "random weights: torchvision's are not on this machine and not to be reached"
    if numbers.pretrained:
        start = "torchvision's weights for ImageNet"
    yield f"teacher: {TEACHER}, from {start}"
    yield f"time: {minutes_text(took.minutes)}, {took.how}"
    yield f"wrote {output}. Next:"
    yield f"  {run}"
    if took.minutes > LONG_MINUTES and numbers.train_rows > TRY_ROWS:
        yield "A shorter try first:"
        yield f"  {run} data.train_rows={TRY_ROWS} data.val_rows=1000"
