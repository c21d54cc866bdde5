"""The checkpoints of a training as they stand in storage, whatever Ray Train has noted of them.

Ray Train writes its notes in place and copies a checkpoint file by file: a kill may cut either
short. What holds is what can be read back whole. Imports no torch: the driver uses this too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.storage import Store, local_copy

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

NOTES = "checkpoint_manager_snapshot.json"  # Ray Train's
PREFIX = "checkpoint_"
STATE = "training_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its folder's name, and what `load_training_state` gives."""

    name: str
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def drop_unreadable_notes(store: Store) -> None:
    """Deletes Ray Train's notes if Ray could not start from them: cut short, or of what is gone.

    `store` is a training's folder. Its checkpoints stay and are found without notes.
    """
    if not store.exists(NOTES):
        return
    try:
        results = json.loads(store.read_bytes(NOTES))["checkpoint_results"]
        whole = all(store.exists(result["checkpoint_dir_name"]) for result in results)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        logger.warning("%s is cut short; Ray Train starts without it", store.join(NOTES))
        store.delete(NOTES)


def newest_intact(store: Store, note: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of the most steps that reads whole; None if there is none.

    `note` is told, in one message, of newer ones that do not.
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
        going_on = f"going on from {found.name}" if found else "training begins anew"
        note(f"checkpoint {', '.join(damaged)} cannot be used: {going_on}")
    return found


def read_checkpoint(store: Store, name: str) -> Checkpoint:
    """The checkpoint in one folder. Raises ModelError if it is cut short or damaged."""
    from mantis_core.checkpoint import load_training_state

    with local_copy(store.join(name)) as folder:
        return Checkpoint(name, *load_training_state(folder))


def _newest_first(store: Store) -> list[str]:
    """Names by steps, those that tell none first. Names hold the clock of the node that wrote."""

    def steps(name: str) -> float:
        try:
            return float(json.loads(store.read_bytes(f"{name}/{STATE}"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return float("inf")

    names = [name for name in store.list() if name.startswith(PREFIX) and name != NOTES]
    return sorted(names, key=steps, reverse=True)
