"""Reads the label file of a folder of images: which image has which class. Lists no folders.

A line can often be read in several ways: `my cat.jpg cat` has two blanks. The images decide: the
reading counts whose file is among them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import DataError

FILE_COLUMNS = (
    *("file", "filename", "file_name", "filepath", "file_path", "path"),
    *("image", "image_path", "image_name", "image_id", "imageid", "img", "name", "id"),
)
CLASS_COLUMNS = (
    *("class", "class_id", "classid", "label", "wnid", "category", "target"),
    *("class_name", "label_name", "predictionstring"),
)
"""Names of columns in a header. Of several the first one here counts."""

SUFFIX = re.compile(r"\.\w{1,5}$")
NUMBER = re.compile(r"-?\d+(\.\d+)?")
BOX = 4  # numbers that may follow a class, as in ImageNet's LOC_val_solution.csv
SHOWN = 3  # images in an error message

Fields = tuple[str, ...]
Columns = tuple[int, int]  # of the image and of its class


@dataclass(frozen=True)
class Line:
    """A line of a label file: its number, and its fields by each way to read it."""

    number: int
    readings: tuple[Fields, ...]


@dataclass(frozen=True)
class Entry:
    """A line that names images: the class, and how well the name fits (0 is best)."""

    number: int
    file: str
    label: str
    images: tuple[str, ...]
    fit: int


def read_labels(
    content: bytes, where: str, images: Sequence[str], *, folder: str = ""
) -> dict[str, str]:
    """Returns the class id by image, for the images that the label file `where` names.

    `images` are paths below `folder`, which lies in the source. A line names an image by its path
    below the folder or below the source, by its name, or by its name without the suffix. A path
    from elsewhere counts by its end, and another suffix does not matter, where no other line is
    closer. Lines that name no image are left out. Raises DataError if the
    file is not UTF-8 or has nothing but numbers, if a line names several images or no class, if two
    lines give one image different classes, and if a header leaves open which columns to take.
    """
    lines = list(_lines(_text(content, where), where))
    if lines and all(NUMBER.fullmatch("\t".join(line.readings[0])) for line in lines):
        raise DataError(
            f"{where} has one number a line, like the ground truth of ImageNet's devkit: it names "
            "no image. Give ImageNet's LOC_val_solution.csv, or lines of the form 'file class'"
        )
    names = Names(images, folder)
    lines, columns = _without_header(lines, names, where)
    entries = [entry for line in lines if (entry := _entry(line, names, columns))]
    labels: dict[str, Entry] = {}
    for entry in entries:
        if entry.fit < Names.ELSEWHERE:
            _note(labels, entry, where)
    sure = set(labels)
    for entry in entries:  # such a name may mean an image that is not here
        if entry.fit == Names.ELSEWHERE and not sure.intersection(entry.images):
            _note(labels, entry, where)
    return {image: entry.label for image, entry in labels.items()}


class Names:
    """The images by all that a line may call them."""

    PATH, NAME, STEM, ELSEWHERE = range(4)

    def __init__(self, images: Sequence[str], folder: str) -> None:
        self._prefix = "" if folder in ("", ".") else f"{_plain(folder)}/"
        self._paths: dict[str, list[str]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        self._stems: dict[str, list[str]] = defaultdict(list)
        for image in images:
            path = _plain(image)
            name = posixpath.basename(path)
            self._paths[path].append(image)
            self._names[name].append(image)
            self._stems[SUFFIX.sub("", name)].append(image)

    def find(self, written: str) -> tuple[int, tuple[str, ...]]:
        """Returns how well a name fits and the images it may mean, () where it means none."""
        path = _plain(written)
        below = path.removeprefix(self._prefix)
        found = self._paths.get(path) or self._paths.get(below)
        if found:
            return self.PATH, tuple(found)
        *above, name = below.split("/")
        for start in range(1, len(above)):
            if found := self._paths.get("/".join([*above[start:], name])):
                return self.ELSEWHERE, tuple(found)
        kinds = ((self.NAME, self._names, name), (self.STEM, self._stems, name))
        for fit, known, key in (*kinds, (self.ELSEWHERE, self._stems, SUFFIX.sub("", name))):
            if key in known:
                return self.ELSEWHERE if above else fit, tuple(known[key])
        return self.ELSEWHERE, ()


def _text(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}): save it as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{where} is not UTF-8 (it has zero bytes): save it as UTF-8")
    return text


def _lines(text: str, where: str) -> Iterator[Line]:
    """Yields the lines that are not empty. In a .csv file quoted fields may span several."""
    if not where.lower().endswith(".csv"):
        for number, line in enumerate(io.StringIO(text, newline=None), start=1):
            if line.strip():
                yield Line(number, _readings(line.strip()))
        return
    first = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub(r'"[^"]*"', "", first)
    separator = next((letter for letter in bare if letter in ",;\t"), ",")
    rows = _csv(io.StringIO(text, newline=""), separator)
    try:
        for row in rows:
            fields = tuple(field.strip() for field in row)
            if any(fields):
                # A line without the separator may have another one.
                yield Line(rows.line_num, (fields,) if len(fields) > 1 else _readings(fields[0]))
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}; correct the quotes") from None


def _csv(lines: Iterable[str], separator: str) -> Any:
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)


def _readings(line: str) -> tuple[Fields, ...]:
    """Returns the fields of a line by each way to read it, the likelier ones first."""
    if "\t" in line:
        return (tuple(field.strip() for field in line.split("\t")),)
    found = [tuple(line.rsplit(None, 1))]
    for separator in ",;":
        with contextlib.suppress(csv.Error):
            found += [tuple(row) for row in _csv([line], separator)]
    found.append(tuple(line.split(None, 1)))
    readings = tuple(tuple(f.strip() for f in fields) for fields in found if len(fields) > 1)
    return readings or ((line,),)


def _without_header(lines: list[Line], names: Names, where: str) -> tuple[list[Line], Columns]:
    """Returns the lines without comments and a header before the first image, and the columns.

    Without a header the first column names the image, the second its class.
    """
    usual = (0, 1)
    for start, line in enumerate(lines):
        both = [_named(fields) for fields in line.readings]
        for file, label in both:
            if file is not None and label is not None:
                return lines[start + 1 :], (file, label)
        if _entry(line, names, usual):
            return lines[start:], usual
        if line.readings[0][0].startswith("#"):
            continue
        if any(SUFFIX.search(field) for fields in line.readings for field in fields):
            return lines[start:], usual  # an image that is not here
        columns = [
            _completed(fields, found, where)
            for fields, found in zip(line.readings, both, strict=True)
            if found != (None, None)
        ]
        return lines[start + 1 :], columns[0] if columns else usual
    return [], usual


def _named(fields: Fields) -> tuple[int | None, int | None]:
    """Returns which fields of a header are the column of images and that of classes."""
    words = [re.sub(r"[\s-]+", "_", field.lstrip("# ").lower()) for field in fields]
    file, label = (
        next((words.index(name) for name in known if name in words), None)
        for known in (FILE_COLUMNS, CLASS_COLUMNS)
    )
    return file, label


def _completed(fields: Fields, found: tuple[int | None, int | None], where: str) -> Columns:
    """Returns the columns of a header that names one of the two. Raises DataError if it is open."""
    file, label = found
    if len(fields) == 2:
        return (1 - label, label) if label is not None else (file or 0, 1 - (file or 0))
    if file == 0 or (file is None and label):
        return 0, label or 1
    raise DataError(
        f"{where} has the columns {', '.join(fields)}, and it is open which of them names the "
        f"image or its class: call them 'file' and 'class'"
    )


def _entry(line: Line, names: Names, columns: Columns) -> Entry | None:
    """Returns what a line says by the reading that fits the images best, None if none does."""
    file, label = columns
    found = []
    for fields in line.readings:
        if len(fields) > file and fields[file]:
            fit, images = names.find(fields[file])
            if images:
                text = fields[label] if len(fields) > label else ""
                found.append(Entry(line.number, fields[file], _without_boxes(text), images, fit))
    return min(found, key=lambda entry: entry.fit, default=None)


def _note(labels: dict[str, Entry], entry: Entry, where: str) -> None:
    """Notes the class of one image. Raises DataError where line and image do not fit together."""
    place = f"{where}, line {entry.number}: '{entry.file}'"
    if len(entry.images) > 1:
        some = ", ".join(sorted(entry.images)[:SHOWN])
        raise DataError(
            f"{place} may mean {len(entry.images)} images ({some}): give the path of each"
        )
    if not entry.label:
        raise DataError(f"{place} has no class: add it, or remove the line and the image")
    before = labels.setdefault(entry.images[0], entry)
    if before.label != entry.label:
        raise DataError(
            f"{place} has the class '{entry.label}', and '{before.label}' in line {before.number}: "
            "keep one of the two lines"
        )


def _without_boxes(text: str) -> str:
    """Returns a class without the boxes of its objects, as they stand in ImageNet's own files."""
    words = text.split()
    size = 1 + BOX
    numbers = [word for place, word in enumerate(words) if place % size]
    if len(words) % size or not all(map(NUMBER.fullmatch, numbers)) or len({*words[::size]}) != 1:
        return text
    return words[0]


def _plain(path: str) -> str:
    """Returns a path in one notation: slashes, no `./`, composed accents."""
    slashes = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return posixpath.normpath(slashes)
