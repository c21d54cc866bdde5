"""Reads a folder of image files: class folders, splits of class folders, or a label file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.sources.folder import IMAGE_SUFFIXES
from data_prep.sources.labels import read_labels
from pipelines.starting.reading import SPLIT_WORDS, Reading, StartError, some, split_of

LABEL_SUFFIXES = (".csv", ".tsv", ".txt")
LABEL_BYTES = 512 * 2**20  # a larger text file is no label file
NOT_READ = (".heic", ".heif", ".avif", ".jfif", ".jxl", ".jp2", ".svg", ".raw", ".dng", ".nef")
DATA_FILES = (".parquet", ".tar")


def folder_reading(folder: Path, labels: Path | None = None) -> Reading | None:
    """Returns how the image files of a folder are read, None if it has none.

    `labels` is the label file to take. Raises StartError where the images have no classes, lie too
    deep, or can be read in two ways.
    """
    splits: dict[str, Path] = {}
    others: list[Path] = []
    for child in subfolders(folder):
        split = SPLIT_WORDS.get(child.name.lower())
        if split is None:
            others.append(child)
        elif split in splits:
            raise StartError(
                f"{folder} has two folders for the {split} images, {splits[split].name}/ and "
                f"{child.name}/: move one of them elsewhere"
            )
        else:
            splits[split] = child
    holding = [child for child in others if has_image(child)]
    if "train" in splits and has_image(splits["train"]):
        return _of_splits(folder, splits, holding, labels)
    flat = direct_images(folder)
    label_file = labels or (_label_file(folder, folder) if flat or holding else None)
    if label_file is not None:
        return _of_labels(folder, label_file, holding)
    held = [name for name in sorted(splits) if has_image(splits[name])]
    if holding and held:
        named = some(child.name for child in holding)
        raise StartError(
            f"{folder} can be read in two ways: {named} and {splits[held[0]].name} as classes, or "
            f"{splits[held[0]].name}/ as a split beside them. Put the folders {named} into "
            f"{folder}/train, or rename {splits[held[0]].name}/"
        )
    if held:
        raise StartError(
            f"{folder} has images in {splits[held[0]].name}/ and no train folder: give that folder "
            f"as `mantis init {splits[held[0]]}`, or call it {folder / 'train'}"
        )
    if holding:
        return _of_classes(folder, holding)
    if flat:
        raise StartError(
            f"the {flat} images in {folder} have no classes: put each into a folder named by its "
            f"class ({folder}/cat/1.jpg), or add a file {folder}/labels.csv with lines 'file,class'"
        )
    return None


def subfolders(folder: Path) -> list[Path]:
    """Returns the visible folders directly in a folder, sorted. Raises StartError."""
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith((".", "__"))
        )
    except OSError as error:
        raise StartError(f"{folder} cannot be listed: {error.strerror or error}") from None


def files_below(folder: Path) -> Iterator[Path]:
    """Yields the visible files below a folder."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(where, name)


def is_image(path: Path) -> bool:
    """Returns whether a file's suffix is that of an image that sources read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def has_image(folder: Path) -> bool:
    """Returns whether an image lies anywhere below a folder. Stops at the first."""
    return any(is_image(path) for path in files_below(folder))


def direct_images(folder: Path) -> int:
    """Returns how many images lie directly in a folder."""
    return sum(is_image(path) for path in folder.iterdir() if path.is_file())


def nothing_found(folder: Path) -> StartError:
    """Returns the error for a folder without images, which names what lies there instead."""
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in files_below(folder))
    there = some(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) or "no file"
    unread = [suffix for suffix in suffixes if suffix in NOT_READ]
    hint = f". Convert {', '.join(unread)} files to JPEG or PNG" if unread else ""
    return StartError(
        f"{folder} has no images: there is {there}. Give a folder of class folders with "
        f"{', '.join(each[1:].upper() for each in IMAGE_SUFFIXES)} files, of Parquet files or of "
        f"WebDataset tars{hint}"
    )


def _of_splits(
    folder: Path, splits: dict[str, Path], others: Sequence[Path], labels: Path | None
) -> Reading:
    """Returns the reading of a folder with a train folder."""
    train, notes = splits["train"], []
    source: dict[str, object] = {"kind": "image_folder", "train": train.name, "val": None}
    classes = _class_folders(train)
    if classes and labels is None:
        _refuse_nested(train, classes)
        what = "train images in class folders"
    else:
        label_file = labels or _label_file(folder, train)
        if label_file is None:
            raise StartError(
                f"the images in {train} have no classes: put each into a folder named by its class "
                f"({train}/cat/1.jpg), or add a label file with lines 'file,class'"
            )
        source["train_labels"] = os.path.relpath(label_file, folder)
        what = f"train images labelled by {label_file.name}"
    for split in ("val", "test"):
        place = splits.get(split)
        if place is None or not has_image(place):
            continue
        if source["val"] is not None:
            notes.append(f"{place.name}/ is not used: {source['val']}/ is the val split")
            continue
        label_file = None if _class_folders(place) else _label_file(folder, place)
        if label_file is None and not _class_folders(place):
            notes.append(f"{place.name}/ is not used: its images have no classes")
            continue
        source["val"] = place.name
        if label_file is not None and label_file.name != "val_annotations.txt":
            source["val_labels"] = os.path.relpath(label_file, folder)
        what += f", val images in {place.name}/"
    if others:
        notes.append(f"{some(child.name + '/' for child in others)} not used beside train/")
    return Reading(folder, source, what, tuple(notes))


def _of_classes(folder: Path, classes: Sequence[Path]) -> Reading:
    """Returns the reading of a folder of class folders."""
    _refuse_nested(folder, classes)
    empty = [child.name for child in subfolders(folder) if child not in classes]
    notes = (f"no image in {some(empty)}: no class",) if empty else ()
    source = {"kind": "image_folder", "train": ".", "val": None}
    return Reading(folder, source, "class folders", notes)


def _of_labels(folder: Path, label_file: Path, classes: Sequence[Path]) -> Reading:
    """Returns the reading of a folder whose label file gives each image its class."""
    if len(classes) > 1 and label_file.parent == folder:
        found = _labels_of(label_file, folder)
        if all(found[image] == image.split("/")[0] for image in found):
            return _of_classes(folder, classes)
        raise StartError(
            f"{folder} can be read in two ways: {some(child.name for child in classes)} as "
            f"classes, or {label_file.name} as their label file. Move the label file elsewhere, or "
            f"give it as `mantis init {folder} --labels {label_file}`"
        )
    place = os.path.relpath(label_file, folder)
    source = {"kind": "image_folder", "train": ".", "val": None, "train_labels": place}
    return Reading(folder, source, f"images labelled by {place}")


def _class_folders(folder: Path) -> list[Path]:
    return [child for child in subfolders(folder) if has_image(child)]


def _refuse_nested(folder: Path, classes: Sequence[Path]) -> None:
    """Raises StartError where the class folders lie a level deeper, or there is only one."""
    deeper = {
        child: inner
        for child in classes
        if not direct_images(child) and len(inner := _class_folders(child)) > 1
    }
    if len(deeper) == len(classes):
        first, inner = next(iter(deeper.items()))
        tasks = (
            ". To ask one question for each of the folders "
            f"{some(child.name for child in classes)}, name each as a source: the guide's page on "
            "your own images shows it"
            if len(classes) > 1
            else ""
        )
        raise StartError(
            f"the class folders lie too deep: {first} holds {some(each.name for each in inner)}. "
            f"Give the folder that holds them: `mantis init {first}`{tasks}"
        )
    if len(classes) == 1:
        raise StartError(
            f"{folder} has images of one class alone, {classes[0].name}: a codec answers which of "
            "several it is, so add a folder of another class"
        )


def _label_file(folder: Path, images: Path) -> Path | None:
    """Returns the label file of the images below `images`: it lies there or in `folder`.

    It names at least half of the images, and is not called by another split. Raises StartError if
    several do.
    """
    split = split_of(images.name)
    candidates = [
        path
        for place in dict.fromkeys((images, folder))
        for path in sorted(place.iterdir())
        if path.suffix.lower() in LABEL_SUFFIXES and 0 < path.stat().st_size < LABEL_BYTES
    ]
    own = [path for path in candidates if split and split_of(path.name) == split]
    shared = [path for path in candidates if not split or split_of(path.name) is None]
    fitting = [path for path in own if _names_half(path, images)]
    fitting = fitting or [path for path in shared if _names_half(path, images)]
    if len(fitting) > 1:
        raise StartError(
            f"{some(path.name for path in fitting)} both give the images in {images} classes: "
            f"choose one, such as `mantis init {folder} --labels {fitting[0]}`"
        )
    return fitting[0] if fitting else None


def _names_half(label_file: Path, images: Path) -> bool:
    """Returns whether a file gives at least half of the images one of several classes."""
    try:
        found = _labels_of(label_file, images)
    except DataError:
        return False
    count = sum(is_image(path) for path in files_below(images))
    return 2 * len(found) >= count and len(set(found.values())) > 1


def _labels_of(label_file: Path, images: Path) -> dict[str, str]:
    names = [path.relative_to(images).as_posix() for path in files_below(images) if is_image(path)]
    return read_labels(label_file.read_bytes(), str(label_file), names, folder=images.name)
