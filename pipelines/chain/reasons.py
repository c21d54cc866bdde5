"""Says why a stage has no result yet: how it differs from the closest finished stage of its name.

Compares with what each stage folder recorded at its start. Decides nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.chain.source_hash import module_hashes
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store
from pipelines.versions import deciding

SHOWN = 3  # names in a sentence


def made_with(spec: StageSpec) -> dict[str, Any]:
    """Returns the package versions and a hash of each module that enter the stage's key."""
    return {"versions": deciding(), "modules": module_hashes(*spec.stage.code)}


def why_new(store: Store, spec: StageSpec) -> str:
    """Returns why a stage is to run, as part of a sentence; "" if the root has nothing like it.

    The stage is compared with the finished one of its name that has the same recipe, or else with
    the one whose config differs in the fewest fields. Of several the newest counts.
    """
    closest, fewest = None, 0
    for folder, record in _finished(store, spec):
        same = record["recipe"] == spec.recipe
        distance = -1 if same else len(differences(record["config"], _plain(spec.config)))
        if closest is None or distance < fewest:
            closest, fewest = (folder, record), distance
    if closest is None:
        return ""
    folder, record = closest
    other = folder[-12:]
    if record["recipe"] == spec.recipe:
        reason = _of_code(record, made_with(spec)) or "a stage before it is to run"
        return f"{reason} since {other}; --adopt would reuse that result"
    changes = list(_changes(record["config"], _plain(spec.config)))
    if not changes:
        return f"an earlier stage differs from that of {other}"
    text = f"{_some(changes)} since {other}"
    if spec.stage.trains and [each.split()[0] for each in changes] == [
        f"{spec.stage.section}.epochs"
    ]:
        text += "; trained from scratch, because the learning rate falls over all epochs"
    return text


def differences(one: Mapping[str, Any], other: Mapping[str, Any], place: str = "") -> list[str]:
    """Returns the dotted fields in which two nested configs differ."""
    found: list[str] = []
    for name in sorted(one.keys() | other.keys()):
        ours, theirs = one.get(name), other.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += differences(ours, theirs, f"{place}{name}.")
        elif ours != theirs:
            found.append(f"{place}{name}")
    return found


def _finished(store: Store, spec: StageSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (folder, record of its start) of the finished stages of this name, newest first."""
    above, _, name = spec.folder.rpartition("/")
    own = re.compile(re.escape(name[:-12]) + r"[0-9a-f]{12}")
    folders = [f"{above}/{each}" for each in store.list(above) if own.fullmatch(each)]
    done = [each for each in folders if store.exists(f"{each}/DONE")]
    for folder in sorted(done, key=lambda each: store.modified(f"{each}/DONE"), reverse=True):
        if store.exists(f"{folder}/STARTED"):
            record: dict[str, Any] = store.read_json(f"{folder}/STARTED")
            if {"recipe", "config"} <= record.keys():
                yield folder, record


def _of_code(record: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Returns which packages and modules differ; "" if none does."""
    if "modules" not in record:
        return "code or packages changed"
    versions = [
        f"{name} {record['versions'].get(name, 'none')} -> {version}"
        for name, version in ours["versions"].items()
        if record["versions"].get(name) != version
    ]
    modules = [
        name.replace(".", "/") + ".py" for name in differences(record["modules"], ours["modules"])
    ]
    parts = [*([_some(versions)] if versions else [])]
    if modules:
        parts.append(f"{_some(modules)} changed")
    return " and ".join(parts)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yields `field old -> new`. A field that the record does not know has come since then."""
    for place in differences(before, now):
        missing = object()
        old, new = _at(before, place, missing), _at(now, place, missing)
        if old is not missing:
            yield f"{place} {_short(old)} -> {'none' if new is missing else _short(new)}"


def _at(config: Mapping[str, Any], place: str, default: object) -> Any:
    value: Any = config
    for name in place.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _plain(config: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(config))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
