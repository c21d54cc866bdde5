"""Finds the newest intact checkpoint of a training in storage, without Ray Train's notes.

Ray Train overwrites its notes in place and copies a checkpoint one file at a time. If it is killed,
either may be incomplete. A checkpoint counts as intact if all of it can be read. Imports no torch,
because the driver uses this file too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.cluster.ray_private import TRAIN_NOTES
from pipelines.storage import Store, local_copy

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "checkpoint_"
STATE = "training_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the name of its folder, and the values of `load_training_state`."""

    name: str
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def drop_notes(store: Store) -> None:
    """Deletes Ray Train's notes on an earlier attempt. `store` is the folder of a training.

    Ray refuses notes that are incomplete, name a checkpoint that is gone, or come from another
    version. Its checkpoints stay and are found without notes.
    """
    store.delete(TRAIN_NOTES)


def newest_intact(store: Store, note: Callable[[str], None]) -> Checkpoint | None:
    """Returns the intact checkpoint with the most steps, or None if there is none.

    Calls `note` once with a message about newer checkpoints that are damaged.
    """
    from mantis_core.errors import ModelError

    found, damaged = None, []
    for name in _newest_first(store):
        try:
            found = read_checkpoint(store, name)
            break
        except ModelError as error:
            damaged.append(f"{store.join(name)} ({error})")
    if damaged:
        going_on = f"resuming from {found.name}" if found else "the training starts again"
        note(f"checkpoint {', '.join(damaged)} cannot be used: {going_on}")
    return found


def read_checkpoint(store: Store, name: str) -> Checkpoint:
    """Loads the checkpoint in one folder. Raises ModelError if it is incomplete or damaged."""
    from mantis_core.folders import load_training_state

    with local_copy(store.join(name)) as folder:
        return Checkpoint(name, *load_training_state(folder))


def _newest_first(store: Store) -> list[str]:
    """Returns checkpoint names by falling steps, those of unknown steps first.

    The names cannot be compared: each has the clock of the node that wrote it.
    """

    def steps(name: str) -> float:
        try:
            return float(json.loads(store.read_bytes(f"{name}/{STATE}"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return float("inf")

    names = [name for name in store.list() if name.startswith(PREFIX) and name != TRAIN_NOTES]
    return sorted(names, key=steps, reverse=True)
