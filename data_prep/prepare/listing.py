"""Lists what the sources hold: one table of references, checked against the tasks.

Reads names and label columns, no images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import DataError
from data_prep.manifest import SourceInfo, TaskTable
from data_prep.prepare.staging import Job
from data_prep.tasks import did_you_mean


@dataclass(frozen=True)
class Listing:
    """What the sources hold.

    `references` have columns `source` and `split` beside their own. `unassigned` are the rows of no
    task by split, `seen` all class ids of the sources.
    """

    references: pa.Table
    sources: tuple[SourceInfo, ...]
    unassigned: dict[str, int]
    seen: frozenset[str]


def list_sources(job: Job, splits: Sequence[str]) -> Listing:
    """Lists all sources.

    With `unassigned: drop`, rows that cannot be of any task are dropped here, before they are read;
    then the caps apply. Raises DataError where a split or a task has no image.
    """
    data, known = job.data, set(job.table.classes)
    wanted_masks = {mask for mask in job.table.masks if mask}
    kept: dict[str, list[pa.Table]] = {split: [] for split in splits}
    unassigned = dict.fromkeys(splits, 0)
    seen: dict[str, set[str]] = {split: set() for split in splits}
    sources = []
    for source in data.sources:
        rows = {}
        for split in splits:
            listed = source.listing(job.root, split)
            rows[split] = listed.num_rows
            if data.unassigned == "drop" and not wanted_masks & set(source.mask_names):
                ids = listed["class_ids"].to_pylist()
                assigned = pa.array([not known.isdisjoint(row) for row in ids], pa.bool_())
                seen[split].update(class_id for row in ids for class_id in row)
                unassigned[split] += listed.num_rows - (pc.sum(assigned).as_py() or 0)
                listed = listed.filter(assigned)
            else:
                lists = listed["class_ids"].combine_chunks()
                seen[split].update(pc.unique(lists.flatten()).to_pylist())
            count = listed.num_rows
            kept[split].append(
                listed.append_column(
                    "source", pa.array([source.source_name] * count, pa.string())
                ).append_column("split", pa.array([split] * count, pa.string()))
            )
        sources.append(SourceInfo(name=source.source_name, kind=source.kind, rows=rows))
    if "train" in splits:
        _need_every_task(seen["train"], job.table)
    caps = {"train": data.train_rows, "val": data.val_rows}
    capped = [_capped(pa.concat_tables(kept[split]), caps[split], job.seed) for split in splits]
    for split, part in zip(splits, capped, strict=True):
        if not part.num_rows:
            raise DataError(
                f"no {split} image of any task: check the sources' {split} setting and the tasks' "
                f"class ids; the {split} images carry {_some(seen[split])}"
            )
    return Listing(
        pa.concat_tables(capped), tuple(sources), unassigned, frozenset().union(*seen.values())
    )


def _need_every_task(seen: set[str], table: TaskTable) -> None:
    """Refuses a classification task without training images."""
    for task in table.tasks:
        ids = [table.classes[index] for index in task.class_indices]
        if ids and seen.isdisjoint(ids):
            raise DataError(
                f"task '{task.name}' has no training image: none carries {_some(set(ids))}; "
                f"the sources have {_some(seen)}{did_you_mean(ids[0], seen)}"
            )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _capped(listing: pa.Table, cap: int | None, seed: int) -> pa.Table:
    """Takes at most `cap` rows, chosen by a hash of the seed and the row's name, in their order."""
    if cap is None or listing.num_rows <= cap:
        return listing
    keys = [
        hashlib.sha256(f"{seed}\0{source}\0{name}".encode()).digest()
        for source, name in zip(
            listing["source"].to_pylist(), listing["source_id"].to_pylist(), strict=True
        )
    ]
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:cap]
    return listing.take(sorted(chosen))
