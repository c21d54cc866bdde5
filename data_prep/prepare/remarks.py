"""What a prepared set lacks or holds twice, as sentences for the person who prepares it.

Looks at the listing of the sources and at the index of the final rows. Reads no images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import Task, TaskTable
from data_prep.prepare.index import Part, active_tasks, first_bytes
from data_prep.prepare.listing import list_sources
from data_prep.prepare.staging import Job
from data_prep.sources.base import counted, values_of
from data_prep.storage import absolute
from data_prep.tasks import did_you_mean

FEW = 0.05  # share of the images up to which they are worth a word
SHOWN = 5  # names in a sentence
LISTED = 12  # classes of which each has its number

KINDS = {"train": "training", "holdout": "held-back", "val": "val"}
EFFECTS = {
    "train": "nothing is learned about them",
    "holdout": "epochs and thresholds are chosen without them (data.holdout_fraction)",
    "val": "no figure covers them",
}

SingleClass = Literal["auto"] | bool
Parts = Mapping[str, Part]  # the final rows of each split


@dataclass(frozen=True)
class Held:
    """The classes of which a split has images, and for each task whether it has any."""

    classes: set[int]
    active: list[bool]


def remarks(parts: Parts, table: TaskTable, seen: Collection[str]) -> list[str]:
    """Returns sentences on tasks and classes without images, and on repeated images.

    `seen` are the class ids that the sources have.
    """
    held = {
        split: Held(
            set(pc.unique(values_of(part.column("class_indices"))[0]).to_pylist()),
            active_tasks(part, table),
        )
        for split, part in parts.items()
    }
    return [*_absences(held, table, seen), *_repetitions(parts, table)]


def listing_remarks(data: DataConfig, table: TaskTable) -> list[str]:
    """Returns sentences on what the sources hold, before any image is read.

    They say how many images each split has by class, what is left out, and which tasks and classes
    have no image. Raises DataError as `list_sources` does.
    """
    listing = list_sources(Job(data, table, 0, absolute(data.root), ""), ("train", "val"))
    position = {class_id: index for index, class_id in enumerate(table.classes)}
    masks = {mask for source in data.sources for mask in source.mask_names}
    found, held = [], {}
    for split in ("train", "val"):
        rows = listing.references.filter(pc.equal(listing.references["split"], split))
        counted_ids = pc.value_counts(values_of(rows["class_ids"])[0]).to_pylist()
        counts = Counter({each["values"]: each["counts"] for each in counted_ids})
        own = {position[class_id] for class_id in counts if class_id in position}
        if split == "train" or not listing.divides:
            active = [
                mask in masks if mask else not own.isdisjoint(task.class_indices)
                for task, mask in zip(table.tasks, table.masks, strict=True)
            ]
            held[split] = Held(own, active)
            found.append(f"{split}: {counted(rows.num_rows, 'image')}{_by_class(counts, table)}")
    if listing.divides:
        found.append(f"val: about {data.val_fraction:.0%} of them (data.val_fraction)")
    return [*found, *listing.notes, *_absences(held, table, listing.seen)]


def decide_single_class(parts: Parts, setting: SingleClass) -> tuple[bool, list[str]]:
    """Returns whether images count as showing one class each, and a sentence on the exceptions.

    Raises DataError if `data.single_class` is true and no image to train on has one class.
    """
    counts = {split: _class_counts(part) for split, part in parts.items()}
    odd = [name for split, part in parts.items() for name in _ids(part, counts[split] != 1)]
    total = sum(map(len, counts.values()))
    if setting is False or not odd:
        return setting is not False, []
    exceptions = (
        f"{len(odd)} of {total} images carry no class of the tasks or several, such as {_some(odd)}"
    )
    if setting is True:
        if "train" in counts and not (counts["train"] == 1).any():
            raise DataError(
                f"data.single_class is true, but {exceptions}, and no image to train on carries "
                "exactly one: set it to auto"
            )
        return True, [f"{exceptions}: they have no part in the joint decision"]
    if len(odd) > FEW * total:
        return False, []
    return False, [
        f"{exceptions}: so nothing is decided between the classes of all tasks. Correct them, or "
        "set data.single_class to true to leave them out of that decision, or to false to agree"
    ]


def _by_class(counts: Counter[str], table: TaskTable) -> str:
    """Returns how many images there are of each class, or of the fewest and the most."""
    own = {class_id: counts[class_id] for class_id in table.classes if counts[class_id]}
    if not own:
        return ""
    if len(own) > LISTED:
        return f" of {len(own)} classes, {min(own.values())} to {max(own.values())} each"
    return f" ({', '.join(f'{class_id} {count}' for class_id, count in own.items())})"


def _absences(held: Mapping[str, Held], table: TaskTable, seen: Collection[str]) -> Iterable[str]:
    """Yields a sentence for each split that lacks tasks, and for each that lacks classes."""
    without_train: set[str] = set()
    for split, part in held.items():
        pairs = zip(table.tasks, part.active, strict=True)
        empty = [task.name for task, there in pairs if not there]
        if empty:
            yield f"no {KINDS[split]} image of task {_some(empty)}: {EFFECTS[split]}"
        present = part.classes
        others = [task for task in table.tasks if task.name not in empty]
        wanted = _classes(others)
        absent = [table.classes[index] for index in wanted if index not in present]
        if split == "train":
            without_train = set(absent)
        elif split == "holdout":
            absent = [class_id for class_id in absent if class_id not in without_train]
        if absent:
            unknown = [class_id for class_id in absent if class_id not in seen]
            hint = did_you_mean(unknown[0], seen) if 0 < len(unknown) <= SHOWN else ""
            yield (
                f"no {KINDS[split]} image of {len(absent)} of {len(wanted)} classes "
                f"({_some(absent)}): {EFFECTS[split]}{hint}"
            )


def _repetitions(parts: Parts, table: TaskTable) -> Iterable[str]:
    """Yields a sentence on val images that are training images too, and one on contradictions."""
    columns = ["content", "class_indices", "source_id"]
    starts = {
        split: first_bytes(part.index["content"])[part.rows.to_numpy()]
        for split, part in parts.items()
    }
    ordered = np.sort(np.concatenate([*starts.values()]))
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    by_content: dict[bytes, list[dict[str, Any]]] = defaultdict(list)
    for split, part in parts.items():
        chosen = np.isin(starts[split], repeated)
        rows = pa.table([part.column(name, chosen) for name in columns], columns)
        for row in rows.to_pylist():
            by_content[row["content"]].append({**row, "split": split})
    trained, contradictory = [], []
    for equal in by_content.values():
        others = [row["source_id"] for row in equal if row["split"] != "val"]
        trained += [
            (row["source_id"], others[0]) for row in equal if row["split"] == "val" and others
        ]
        classes = {tuple(sorted(row["class_indices"])): row for row in equal}
        if len(classes) > 1:
            contradictory.append(list(classes.values())[:2])
    if trained:
        image, other = min(trained)
        yield (
            f"{len(trained)} of {parts['val'].num_rows} val images are training images too, such "
            f"as {image} ({other}): the figures are too good"
        )
    if contradictory:
        one, two = min(contradictory, key=lambda pair: str(pair[0]["source_id"]))
        yield (
            f"{len(contradictory)} pictures stand under different classes, such as "
            f"{_named(one, table)} and {_named(two, table)}"
        )


def _classes(tasks: Sequence[Task]) -> list[int]:
    return list(dict.fromkeys(index for task in tasks for index in task.class_indices))


def _class_counts(part: Part) -> np.ndarray[Any, Any]:
    """Returns the number of classes of each row."""
    counts: np.ndarray[Any, Any] = pc.list_value_length(part.column("class_indices")).to_numpy()
    return counts


def _ids(part: Part, chosen: np.ndarray[Any, Any]) -> list[str]:
    ids: list[str] = part.column("source_id", chosen).to_pylist()
    return ids


def _named(row: Mapping[str, Any], table: TaskTable) -> str:
    classes = " and ".join(table.classes[index] for index in row["class_indices"])
    return f"{row['source_id']} as {classes or 'none of them'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
