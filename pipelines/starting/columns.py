"""Finds the columns of images, labels and groups of labels in Parquet files."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from data_prep.sources.base import class_id_of
from pipelines.coding.packed import image_columns
from pipelines.starting.reading import StartError, some

LABEL_NAMES = (
    *("label_name", "class_name", "label_text", "class", "label", "category", "wnid", "class_id"),
    *("labels", "classes", "target", "fine_label", "y", "species", "breed"),
)
"""Names of columns of labels; of several the first one here counts."""
GROUPS = re.compile(r"group|super|coarse|categor|parent|family|task|domain")
READ_LABELS = 200_000  # rows that are looked at to tell a label from an identifier


@dataclass(frozen=True)
class Columns:
    """The columns of a Parquet source, and the classes of each group of labels."""

    image: str
    label: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def columns_of(files: Sequence[Path], label: str | None = None) -> Columns:
    """Returns the columns of the first of these files; `label` is the column of labels to take.

    Raises StartError where it is no Parquet file, or where it is open which columns to take.
    """
    where = files[0]
    try:
        with pq.ParquetFile(where) as file:
            schema = file.schema_arrow
            image = _image(schema, where)
            labels = _repeating(file, _candidates(schema, image))
    except (pa.ArrowInvalid, OSError) as error:
        raise StartError(f"{where} is no readable Parquet file: {error}") from None
    chosen = label or _label(labels, _class_labels(schema), where, schema.names)
    if chosen not in schema.names or chosen == image:
        raise StartError(f"{where} has no column of labels {chosen!r}; it has {some(schema.names)}")
    others = [name for name in labels if name not in (chosen, image)]
    groups = _groups(labels, chosen, others) if chosen in labels else {}
    return Columns(image, chosen, groups)


def _image(schema: pa.Schema, where: Path) -> str:
    """Returns the column of encoded images. Raises StartError."""
    found = image_columns(schema)
    if len(found) == 1:
        return found[0]
    if found:
        raise StartError(
            f"{where} has several columns of bytes, {some(found)}, and it is open which holds the "
            "images: call it image"
        )
    raise StartError(
        f"{where} has no column of encoded images (bytes, or Hugging Face's struct with a field "
        f"bytes); it has {some(schema.names, 12)}"
    )


def _candidates(schema: pa.Schema, image: str) -> list[str]:
    """Returns the columns that could hold labels."""
    found = []
    for each in schema:
        kind = each.type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        if types.is_dictionary(kind):
            kind = kind.value_type
        text = types.is_string(kind) or types.is_large_string(kind)
        if each.name != image and (text or types.is_integer(kind) or types.is_boolean(kind)):
            found.append(each.name)
    return found


def _repeating(file: pq.ParquetFile, names: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the columns whose values repeat, and so may be labels, from the first rows."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    rows = 0
    for batch in file.iter_batches(65_536, columns=list(names)):
        for name in names:
            columns[name] += batch[name].to_pylist()
        rows += batch.num_rows
        if rows >= READ_LABELS:
            break
    found = {}
    for name, values in columns.items():
        counts = Counter(each for value in values for each in _each(value))
        if len(counts) > 1 and 2 * len(counts) <= max(4, sum(counts.values())):
            found[name] = values
    return found


def _each(value: Any) -> list[str]:
    """Returns the class ids of one cell."""
    cells = value if isinstance(value, list) else [value]
    return [text for cell in cells if (text := class_id_of(cell)) is not None]


def _class_labels(schema: pa.Schema) -> list[str]:
    """Returns the columns that Hugging Face's metadata calls labels."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"]
        return [
            name
            for name, each in features.items()
            if isinstance(each, dict)
            and "ClassLabel" in (each.get("_type"), (each.get("feature") or {}).get("_type"))
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _label(
    labels: Mapping[str, Sequence[Any]],
    class_labels: Sequence[str],
    where: Path,
    names: Sequence[str],
) -> str:
    """Returns the column of labels. Raises StartError where it is open."""
    lower = {name.lower(): name for name in labels}
    known = [lower[name] for name in LABEL_NAMES if name in lower]
    declared = [name for name in class_labels if name in labels]
    if declared:
        return next((name for name in known if name in declared), declared[0])
    if known or len(labels) == 1:
        return known[0] if known else next(iter(labels))
    if labels:
        raise StartError(
            f"{where} has several columns that may hold the labels, {some(labels, 8)}: choose one, "
            f"such as `mantis init {where} --labels {next(iter(labels))}`"
        )
    raise StartError(
        f"{where} has no column of labels, that is of whole numbers or text that repeat; it has "
        f"{some(names, 12)}"
    )


def _groups(
    labels: Mapping[str, Sequence[Any]], chosen: str, others: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Returns the classes of each group, if a column of text divides the classes into groups."""
    for name in others:
        if not GROUPS.search(name.lower()):
            continue
        members: dict[str, set[str]] = defaultdict(set)
        for group, value in zip(labels[name], labels[chosen], strict=True):
            if isinstance(group, str):
                members[group].update(_each(value))
        classes = [class_id for own in members.values() for class_id in own]
        each_in_one = len(classes) == len(set(classes))
        if each_in_one and len(members) > 1 and min(map(len, members.values())) > 1:
            return {group: tuple(sorted(own)) for group, own in sorted(members.items())}
    return {}
