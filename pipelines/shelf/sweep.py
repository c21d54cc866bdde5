"""Decides what below a storage root nothing needs any more, and removes it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from pipelines.shelf.contents import Shelved
from pipelines.stages.record import StageBusy, locked
from pipelines.storage import Store

PARTIAL = re.compile(r"\..+\.([0-9a-f]+\.partial|[a-z0-9_]{8})|.+\.part")
"""Names under which files are written before they are whole."""
WRITING_S = 24 * 3600.0
"""Age from which a partial file, and anything on a remote root, counts as left by a dead process.

A remote root has no locks, so what was changed lately may be in use.
"""


@dataclass(frozen=True)
class Waste:
    """A file or folder that may go. `path` is relative to the root, `lock` the folder to lock."""

    path: str
    why: str
    size: int
    lock: str = ""

    @property
    def is_stage(self) -> bool:
        """Returns whether this is a whole stage."""
        return bool(self.lock) and self.lock == self.path


def waste(
    store: Store, stages: Sequence[Shelved], *, now: float, older_than_s: float
) -> list[Waste]:
    """Returns what may be removed, of what has not changed for `older_than_s`.

    These are stages that nothing needs, the training folders of such stages and of finished ones,
    kept answers of arms, temporary folders and partial files.
    """
    if not store.is_local:
        older_than_s = max(older_than_s, WRITING_S)
    before = now - older_than_s
    found = []
    gone = set()
    for stage in stages:
        if stage.state != "busy" and not stage.needed_by and stage.changed <= before:
            gone.add(stage.path)
            why = f"{stage.state}, {_why(stage)}"
            found.append(Waste(stage.path, why, stage.size, lock=stage.path))
    found += _trainings(store, stages, gone, before)
    found += _entries(store, "measured", "answers of an arm, which can be measured again", before)
    left = now - max(older_than_s, WRITING_S)
    found += _entries(store, "scratch", "temporary files of a process that died", left)
    found += _partial_files(store, left, gone)
    return found


def remove(store: Store, item: Waste) -> str:
    """Removes one item. Returns why it is still there; "" if it is gone."""
    try:
        with locked(store, item.lock, item.path) if item.lock else contextlib.nullcontext():
            store.delete(item.path)
    except StageBusy as error:
        return str(error)
    except OSError as error:
        return f"cannot remove {store.join(item.path)}: {error.strerror or error}"
    return ""


def _why(stage: Shelved) -> str:
    if not stage.used_by:
        return "no plan uses it"
    if any(", trial " in user for user in stage.used_by):
        return f"of an ended trial ({stage.used_by[0]})"
    return f"only of an earlier plan of {', '.join(stage.used_by)}"


def _trainings(
    store: Store, stages: Sequence[Shelved], gone: Set[str], before: float
) -> Iterator[Waste]:
    """Yields checkpoints of trainings that no run will continue."""
    known = {stage.key: stage for stage in stages}
    for key in store.list("training"):
        stage = known.get(key[:12])
        path = f"training/{key}"
        size, changed = store.usage(path)
        if changed > before or (stage is not None and stage.state == "busy"):
            continue
        if stage is None:
            yield Waste(path, "checkpoints, their stage is gone", size)
        elif stage.path in gone:
            yield Waste(path, f"checkpoints of {stage.path}", size)
        elif stage.state == "done":
            yield Waste(path, "checkpoints, their stage is done", size, lock=stage.path)


def _entries(store: Store, folder: str, why: str, before: float) -> Iterator[Waste]:
    """Yields the entries of a folder that have not changed since `before`."""
    for name in store.list(folder):
        size, changed = store.usage(f"{folder}/{name}")
        if changed <= before:
            yield Waste(f"{folder}/{name}", why, size)


def _partial_files(store: Store, before: float, gone: Set[str]) -> Iterator[Waste]:
    """Yields what processes left that died while they wrote a file."""
    for top in ("plans", "searches", "spool", "stages"):
        for name in store.files(top):
            path = f"{top}/{name}"
            inside = any(path.startswith(f"{folder}/") for folder in gone)
            if inside or not PARTIAL.fullmatch(name.rpartition("/")[2]):
                continue
            size, changed = store.usage(path)
            if changed <= before:
                yield Waste(path, "a file that was never finished", size)
