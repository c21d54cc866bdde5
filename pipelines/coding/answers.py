"""Writes answers: a table with a row for each image, and masks as PNG files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mantis_core.device.files import Failure, FilesError, cannot_write, shown, write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mantis_core.codec.answer import Answer
    from mantis_core.tasks import TaskSpec

FORMATS = (".csv", ".jsonl")


def columns(tasks: Sequence[TaskSpec], *, numbered: bool) -> list[str]:
    """Returns the columns of the CSV table. `numbered` adds the number of an image in its file."""
    own = [
        name for task in tasks for name in (f"task/{task.name}", f"task/{task.name}/probability")
    ]
    return [
        "file",
        *(["image"] if numbered else []),
        "class",
        "probability",
        *own,
        "wire_bytes",
        "error",
    ]


def csv_row(answer: Answer, tasks: Sequence[TaskSpec]) -> dict[str, Any]:
    """Returns an answer as cells of the CSV table. Tasks that were not sent are left out.

    A task's cell holds its label, for a segmentation the share of pixels of each label.
    """
    cells: dict[str, Any] = {"wire_bytes": f"{answer.wire_bytes:.6g}"}
    if answer.class_name is not None:
        cells |= {"class": answer.class_name, "probability": f"{answer.class_probability:.4f}"}
    for task in tasks:
        if task.name not in answer.tasks:
            continue
        if task.is_classification:
            label: str = answer.label_names.get(task.name) or str(answer.labels[task.name])
        else:
            label = shares(answer, task)
        cells[f"task/{task.name}"] = label
        sent = answer.task_probability[task.name]
        cells[f"task/{task.name}/probability"] = f"{sent:.4f}"
    return cells


def shares(answer: Answer, task: TaskSpec) -> str:
    """Returns the share of pixels of each label of a mask, the largest first: `road 0.61, sky`."""
    found: dict[str, float] = answer.to_dict()["segmentation"][task.name]
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{label_name(task, int(index))} {share:.2f}" for index, share in ranked)


def label_name(task: TaskSpec, index: int) -> str:
    """Returns the name of a label, or its index if the labels have no names."""
    return task.labels[index] if index < len(task.labels) else str(index)


class Table:
    """Writes a row for each image as it comes: CSV, or one JSON object a line.

    `path` ends in .csv or .jsonl. Rows go to `<path>.partial`. That file gets its name at the end
    of the `with` block, so a table that was interrupted is never taken for a whole one. Without
    `path` the table is CSV text that `take` returns. Raises FilesError if it cannot be written.
    """

    def __init__(
        self, path: Path | None, tasks: Sequence[TaskSpec], *, numbered: bool = False
    ) -> None:
        self.path, self.tasks, self.numbered = path, tasks, numbered
        self.partial = None if path is None else path.with_name(f"{path.name}.partial")
        self._as_csv = path is None or path.suffix == ".csv"
        self._file: TextIO = io.StringIO(newline="") if path is None else self._opened(path)
        names = columns(tasks, numbered=numbered)
        self._csv = csv.DictWriter(self._file, names, restval="", lineterminator="\n")
        if self._as_csv:
            self._written(self._csv.writeheader)

    def add(self, file: Path, answers: Sequence[Answer]) -> None:
        """Adds the answers to the images of a file."""
        for number, answer in enumerate(answers, start=1):
            own = {"file": shown(file), **({"image": number} if self.numbered else {})}
            cells = csv_row(answer, self.tasks) if self._as_csv else answer.to_dict()
            self._add({**own, **cells})

    def add_failure(self, failure: Failure) -> None:
        """Adds a row that says why a file has no answer."""
        self._add(failure.to_dict())

    @property
    def name(self) -> Path:
        """The path that the table gets at the end."""
        assert self.path is not None
        return self.path

    def take(self) -> str:
        """Returns the text since the last call, without its last line end."""
        assert isinstance(self._file, io.StringIO)
        text = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return text.removesuffix("\n")

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the table, and gives it its name unless the block ended with an error."""
        if kind is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            return
        self._written(self._file.close)
        if self.path is not None and self.partial is not None:
            try:
                self.partial.replace(self.path)
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def _add(self, cells: dict[str, Any]) -> None:
        if self._as_csv:
            self._written(self._csv.writerow, cells)
        else:
            self._written(self._file.write, json.dumps(cells, allow_nan=False) + "\n")

    def _written(self, write: Any, *arguments: Any) -> None:
        try:
            write(*arguments)
        except OSError as error:
            raise cannot_write(self.path or Path("stdout"), error) from error

    def _opened(self, path: Path) -> TextIO:
        assert self.partial is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self.partial.open("w", encoding="utf-8", newline="", buffering=1)
        except OSError as error:
            raise cannot_write(path, error) from error


def check_table(path: Path) -> None:
    """Raises FilesError unless a table can have this name."""
    if path.suffix not in FORMATS:
        raise FilesError(
            f"{shown(path)} is no name for a table: give a name that ends in {' or '.join(FORMATS)}"
        )
    if path.is_dir():
        raise FilesError(f"{shown(path)} is a folder: give the name of a file")


def write_masks(folder: Path, place: str, answers: Sequence[Answer]) -> list[Path]:
    """Writes the masks of a file's images as PNG and returns their paths.

    The mask of a task is `<folder>/<place>.<task>.png`, or `<place>.<number>.<task>.png` in a file
    of several images.
    """
    written = []
    for number, answer in enumerate(answers, start=1):
        own = f"{place}.{number}" if len(answers) > 1 else place
        for task, mask in answer.segmentation.items():
            written.append(folder / f"{own}.{task}.png")
            write_whole(written[-1], mask_png(mask))
    return written


def write_labels(folder: Path, tasks: Sequence[TaskSpec]) -> None:
    """Writes labels.json: the names of each segmentation's labels, in the order of pixel values."""
    named = {
        task.name: [label_name(task, index) for index in range(task.num_classes)]
        for task in tasks
        if not task.is_classification
    }
    if named:
        write_whole(folder / "labels.json", json.dumps(named, indent=2).encode() + b"\n")


def mask_png(mask: NDArray[np.uint8]) -> bytes:
    """Returns a mask, uint8 (H, W), as a PNG file whose pixel values are label indices.

    Its palette is that of PASCAL VOC, so that viewers show the labels in different colours.
    """
    from PIL import Image

    image = Image.fromarray(mask)
    image.putpalette(palette())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def palette() -> bytes:
    """Returns the 256 RGB colours of PASCAL VOC's masks, three bytes each."""
    colours = bytearray()
    for index in range(256):
        channels, bits = [0, 0, 0], index
        for place in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= (bits >> channel & 1) << place
            bits >>= 3
        colours += bytes(channels)
    return bytes(colours)
