"""Lists the stages below a storage root, with the plans, models and trials that need them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.search.journal import Journal
from pipelines.stages.record import STAGES_OF_PLAN, is_locked
from pipelines.storage import Store

State = Literal["done", "started", "adopted", "busy"]
STAGES = STAGES_OF_PLAN.removesuffix(".json")
FOLDER = re.compile(r"(?P<name>.+)-(?P<key>[0-9a-f]{12})")
MODEL_STAGES = ("stage2", "evaluate", "register")
"""Stages of a plan that its registered model needs, for `mantis report` and `mantis register`."""
ENDED = ("stopped", "failed")  # trials that a search does not take up again


class ShelfError(ValueError):
    """Raised if what lies below a root cannot be told."""

    exit_code = 2


@dataclass(frozen=True)
class PlanNote:
    """A plan that was run below the root.

    `stages` is None if it was recorded without them. `run_id` is that of MLflow, None if it has
    none. `used` is the time of its last run, in seconds since 1970.
    """

    key: str
    config: str
    stages: frozenset[str] | None
    run_id: str | None
    used: float


@dataclass(frozen=True)
class Shelved:
    """One stage below the root. `path` is relative to the root, `key` has 12 hex digits.

    `used_by` names the configs and trials with this stage, `needed_by` those that keep it.
    `changed` is in seconds since 1970.
    """

    path: str
    name: str
    key: str
    state: State
    size: int
    changed: float
    used_by: tuple[str, ...]
    needed_by: tuple[str, ...]


def stage_folders(store: Store, below: str = "stages") -> Iterator[tuple[str, str, str]]:
    """Yields (path, stage name, 12 digits of the key) of each stage folder."""
    for entry in store.list(below):
        path, found = f"{below}/{entry}", FOLDER.fullmatch(entry)
        if found:
            name = f"{below}/{found['name']}".removeprefix("stages/")
            yield path, name, found["key"]
        elif store.is_folder(path):
            yield from stage_folders(store, path)


def plans(store: Store) -> list[PlanNote]:
    """Returns the plans that were run below the root, the newest first."""
    names = [name for name in store.list("plans") if not name.startswith(".")]
    keys = {name.removesuffix(".json").removesuffix(STAGES) for name in names}
    found = []
    for key in keys:
        note, run_file = f"plans/{key}{STAGES_OF_PLAN}", f"plans/{key}.json"
        run_id = _json(store, run_file)["run_id"] if store.exists(run_file) else None
        if store.exists(note):
            record = _json(store, note)
            stages, config = frozenset(record["stages"]), record["config"] or key
            found.append(PlanNote(key, config, stages, run_id, record["used"]))
        else:
            found.append(PlanNote(key, key, None, run_id, store.modified(run_file)))
    return sorted(found, key=lambda plan: -plan.used)


def shelved(store: Store, registered: Set[str], *, since: float) -> list[Shelved]:
    """Returns all stages below the root, in order of name, those changed last first.

    `registered` are the keys of stages that registered models name. A plan that was run after
    `since` (seconds since 1970), and the newest plan of each config, need all their stages. Raises
    ShelfError if a record below the root cannot be read.
    """
    folders = list(stage_folders(store))
    used, needed = _uses(store, since)
    short = {key[:12] for key in registered}
    found = []
    for path, name, key in folders:
        size, changed = store.usage(path)
        state = _state(store, path)
        keepers = [*needed[path], *needed[key]]
        if key in short:
            keepers.append("a registered model")
        if state == "done" and needed["done"]:
            keepers += needed["done"]
        users = dict.fromkeys([*used[path], *used[key]])
        found.append(Shelved(path, name, key, state, size, changed, tuple(users), tuple(keepers)))
    return sorted(found, key=lambda stage: (stage.name, -stage.changed))


def _uses(store: Store, since: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Maps stage paths and 12 digits of keys to what uses them, and to what needs them."""
    used: dict[str, list[str]] = defaultdict(list)
    needed: dict[str, list[str]] = defaultdict(list)
    current: set[str] = set()
    for plan in plans(store):
        if plan.stages is None:
            # It may need any stage: an earlier version did not record which.
            needed["done"].append(f"plan {plan.key}, maybe")
            continue
        newest = plan.config not in current
        current.add(plan.config)
        keeps = plan.stages if newest or plan.used >= since else _of_model(store, plan.stages)
        for path in plan.stages:
            used[path].append(plan.config)
        for path in keeps:
            for each in (path, *_adopted(store, path)):
                needed[each].append(plan.config)
    for search in store.list("searches"):
        for number, record in _trials(store, search).items():
            for key in record.keys.values():
                used[key[:12]].append(f"{search}, trial {number}")
                if record.state not in ENDED:
                    needed[key[:12]].append(f"{search}, trial {number}")
    return used, needed


def _of_model(store: Store, stages: Iterable[str]) -> list[str]:
    """Returns those stages of a plan that its registered model needs; none if it has no model."""
    main = [
        path for path in stages if path.removeprefix("stages/").rpartition("-")[0] in MODEL_STAGES
    ]
    registered = any(
        path.startswith("stages/register-") and store.exists(f"{path}/DONE") for path in main
    )
    return main if registered else []


def _adopted(store: Store, path: str) -> list[str]:
    """Returns the stage whose result a stage has adopted."""
    if not store.exists(f"{path}/ADOPTED"):
        return []
    folder: str = _json(store, f"{path}/ADOPTED")["folder"]
    return ["stages/" + folder.rpartition("/stages/")[2]]


def _trials(store: Store, search: str) -> Any:
    try:
        return Journal(store, f"searches/{search}").trials
    except (ValueError, KeyError, OSError) as error:
        raise ShelfError(
            f"the journal in {store.join('searches', search)} cannot be read ({error}). Remove "
            "this folder if the search is of no use any more."
        ) from error


def _state(store: Store, path: str) -> State:
    if is_locked(store, path):
        return "busy"
    if store.exists(f"{path}/DONE"):
        return "done"
    return "adopted" if store.exists(f"{path}/ADOPTED") else "started"


def _json(store: Store, path: str) -> Any:
    try:
        return json.loads(store.read_bytes(path))
    except (ValueError, OSError) as error:
        raise ShelfError(
            f"{store.join(path)} cannot be read ({error}). Remove it, and run its config again."
        ) from error
