"""Reads Parquet files and WebDataset tars: which of them are which split, and what they hold."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.starting.columns import LABEL_NAMES, columns_of
from pipelines.starting.reading import Reading, StartError, some, split_of, without_split

LABEL_SUFFIXES = ("cls", "label", "txt")
SAMPLED_MEMBERS = 12
MOST_LISTED = 50  # files in a config, where no pattern names them alone


def parquet_reading(
    folder: Path, files: Sequence[Path], label_column: str | None = None
) -> Reading:
    """Returns how Parquet files below a folder are read. Opens the first file of each split.

    Raises StartError where the files are of several data sets, or where it is open which column
    holds the images or the labels.
    """
    splits, notes = _splits(folder, files)
    columns = columns_of(splits["train"], label_column)
    source: dict[str, Any] = {
        "kind": "parquet",
        **_patterns(folder, splits),
        "image": columns.image,
        "class_column": columns.label,
    }
    what = f"Parquet files, images in column {columns.image}, labels in column {columns.label}"
    return Reading(folder, source, what, notes, columns.groups)


def tar_reading(folder: Path, files: Sequence[Path], label: str | None = None) -> Reading:
    """Returns how WebDataset tars below a folder are read. Raises StartError."""
    splits, notes = _splits(folder, files)
    source = {
        "kind": "webdataset",
        **_patterns(folder, splits),
        "label": label or _label_suffix(splits["train"][0]),
    }
    return Reading(folder, source, f"WebDataset tars, labels in {source['label']}", notes)


def _label_suffix(path: Path) -> str:
    """Returns the part of a sample that is its label: its suffix or a field of its JSON.

    Raises StartError where the first samples have none of the usual ones.
    """
    suffixes: dict[str, Any] = {}
    try:
        with tarfile.open(path) as tar:
            for member in itertools.islice(tar, SAMPLED_MEMBERS):
                suffix = Path(member.name).name.partition(".")[2]
                if member.isfile() and suffix not in suffixes:
                    opened = tar.extractfile(member)
                    suffixes[suffix] = opened.read() if opened and suffix == "json" else b""
    except (tarfile.TarError, OSError) as error:
        raise StartError(f"{path} is no readable tar file: {error}") from None
    known = [suffix for suffix in LABEL_SUFFIXES if suffix in suffixes]
    with contextlib.suppress(ValueError):
        fields = json.loads(suffixes.get("json") or b"null")
        known += [f"json.{name}" for name in LABEL_NAMES if name in (fields or ())]
    if not known:
        raise StartError(
            f"the samples in {path} have no label: their members end in {some(suffixes)}. Name the "
            f"suffix of the label, such as `mantis init {path} --labels txt`"
        )
    return known[0]


def _splits(folder: Path, files: Sequence[Path]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Returns the files of each split. One split alone is called train. Raises StartError."""
    names = {path: path.relative_to(folder).as_posix() for path in files}
    sets = sorted({without_split(name) for name in names.values()})
    if len(sets) > 1:
        of_set = {without_split(name): path for path, name in names.items()}
        several = [of_set[each] for each in sets]
        raise StartError(
            f"{folder} has files of several data sets: {some(path.name for path in several)}. Give "
            f"the files of one of them: `mantis init {several[0]}`"
        )
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(split_of(names[path]) or "train", []).append(path)
    if len(found) == 1:
        return {"train": list(files)}, ()
    notes: tuple[str, ...] = ()
    if "test" in found:
        if "val" in found:
            notes = (f"the test split ({some(p.name for p in found['test'])}) is not used",)
        else:
            found["val"] = found["test"]
        del found["test"]
    if "train" not in found:
        raise StartError(
            f"{folder} has files for val and test and none for training: give one of them, such as "
            f"`mantis init {found['val'][0]}`"
        )
    return found, notes


def _patterns(folder: Path, splits: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Returns the fields `train` and `val` of a source."""
    val = splits.get("val")
    return {
        "train": _pattern(folder, splits["train"]),
        "val": None if val is None else _pattern(folder, val),
    }


def _pattern(folder: Path, files: Sequence[Path]) -> str | list[str]:
    """Returns a pattern that these files match and no others, else their names.

    Raises StartError if there are too many of those.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    escaped = [re.sub(r"([\[?*])", r"[\1]", name) for name in names]
    if len(names) == 1:
        return escaped[0]
    start = escaped[0]
    while not all(name.startswith(start) for name in escaped):
        start = start[:-1]
    pattern = f"{start.rstrip('0123456789')}*{files[0].suffix}"
    there = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob(f"*{files[0].suffix}")
        if path.is_file()
    ]
    if sorted(name for name in there if fnmatch.fnmatchcase(name, pattern)) == names:
        return pattern
    if len(names) > MOST_LISTED:
        raise StartError(
            f"no pattern names the {len(names)} files {names[0]} to {names[-1]} alone: put them "
            "into a folder of their own"
        )
    return escaped
