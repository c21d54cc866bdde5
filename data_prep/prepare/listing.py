"""Lists what the sources hold: one table of references, checked against the tasks.

Reads names and label columns, no images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import DataError
from data_prep.manifest import SourceInfo, TaskTable
from data_prep.prepare.staging import Job, hashes
from data_prep.sources.base import cells, counted, listing_of, notes_of, repeated, values_of
from data_prep.tasks import did_you_mean

SHOWN = 5  # names in a sentence
NO_CLASS = "no class"


@dataclass(frozen=True)
class Listing:
    """What the sources hold.

    `references` have columns `source` and `split` beside their own. `unassigned` are the rows of no
    task by split, `seen` all class ids of the sources. `divides` says that no source has a val
    split, and that `val_fraction` of the rows is to become one. `notes` are sentences on what the
    sources leave out.
    """

    references: pa.Table
    sources: tuple[SourceInfo, ...]
    unassigned: dict[str, int]
    seen: frozenset[str]
    divides: bool = False
    notes: tuple[str, ...] = ()


def list_sources(job: Job, splits: Sequence[str]) -> Listing:
    """Lists all sources; within one_look() each of them once.

    With `unassigned: drop`, rows that cannot be of any task are dropped here, before they are read;
    then the caps apply. Raises DataError where a split or a task has no image.
    """
    data, known = job.data, pa.array(job.table.classes, pa.string())
    wanted_masks = {mask for mask in job.table.masks if mask}
    kept: dict[str, list[pa.Table]] = {split: [] for split in splits}
    unassigned = dict.fromkeys(splits, 0)
    seen: dict[str, set[str]] = {split: set() for split in splits}
    sources: list[SourceInfo] = []
    notes: list[str] = []
    for source in data.sources:
        rows = {}
        for split in splits:
            listed = listing_of(source, job.root, split)
            rows[split] = listed.num_rows
            place = split if len(data.sources) == 1 else f"{split} of '{source.source_name}'"
            notes += [f"{place}: {note}" for note in notes_of(listed)]
            ids, row_of = values_of(listed["class_ids"])
            seen[split].update(pc.unique(ids).to_pylist())
            if data.unassigned == "drop" and not wanted_masks & set(source.mask_names):
                assigned = np.zeros(listed.num_rows, bool)
                assigned[row_of.filter(pc.is_in(ids, known))] = True
                if not assigned.all():  # a filter copies
                    unassigned[split] += int((~assigned).sum())
                    notes += _left_out(listed.filter(pa.array(~assigned)), place)
                    listed = listed.filter(pa.array(assigned))
            for name, value in (("source", source.source_name), ("split", split)):
                listed = listed.append_column(name, repeated(value, listed.num_rows))
            kept[split].append(listed)
        sources.append(SourceInfo(name=source.source_name, kind=source.kind, rows=rows))
    if "train" in splits:
        _need_every_task(seen["train"], job.table, notes)
    listed_val = sum(source.rows.get("val", 0) for source in sources)
    divides = data.val_fraction is not None and set(splits) == {"train", "val"} and not listed_val
    caps = {"train": data.train_rows, "val": data.val_rows}
    if divides and data.train_rows is not None and data.val_fraction is not None:
        caps["train"] = math.ceil(data.train_rows / (1 - data.val_fraction))
    capped = [_capped(pa.concat_tables(kept[split]), caps[split], job.seed) for split in splits]
    for split, part in zip(splits, capped, strict=True):
        if not part.num_rows and not (divides and split == "val"):
            none_listed = split == "val" and not listed_val
            hint = ", or set data.val_fraction to take a share of the others" if none_listed else ""
            raise DataError(
                f"no {split} image of any task: check the sources' {split} setting and the tasks' "
                f"class ids{hint}; the {split} images carry {_some(seen[split])}"
            )
    return Listing(
        pa.concat_tables(capped),
        tuple(sources),
        unassigned,
        frozenset().union(*seen.values()),
        divides,
        tuple(notes),
    )


def _need_every_task(seen: set[str], table: TaskTable, notes: Sequence[str]) -> None:
    """Refuses a classification task without training images."""
    for task in table.tasks:
        ids = [table.classes[index] for index in task.class_indices]
        if ids and seen.isdisjoint(ids):
            raise DataError(
                f"task '{task.name}' has no training image: none carries {_some(set(ids))}; "
                f"the sources have {_some(seen)}{did_you_mean(ids[0], seen)}"
                f"{'. ' if notes else ''}{'. '.join(notes)}"
            )


def _left_out(rows: pa.Table, place: str) -> Iterator[str]:
    """Yields a sentence on rows of no task, with the classes that they carry."""
    counts = Counter(each for ids in cells(rows["class_ids"]) for each in ids or [NO_CLASS])
    most = counts.most_common()
    shown = [f"{name} ({count})" for name, count in most[:SHOWN]]
    more = f" and {len(most) - SHOWN} more" if len(most) > SHOWN else ""
    yield (
        f"{place}: left out {counted(rows.num_rows, 'image')} of no task, with the classes "
        f"{', '.join(shown)}{more}"
    )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more or "none"


def _capped(listing: pa.Table, cap: int | None, seed: int) -> pa.Table:
    """Takes at most `cap` rows, chosen by a hash of the seed and the row's name, in their order."""
    if cap is None or listing.num_rows <= cap:
        return listing
    rows = zip(cells(listing["source"]), cells(listing["source_id"]), strict=True)
    keys = hashes(f"{seed}\0{source}\0{name}".encode() for source, name in rows)
    return listing.take(np.sort(np.argsort(keys, kind="stable")[:cap]))
