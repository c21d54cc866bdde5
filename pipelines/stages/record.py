"""The record of stages and runs under the storage root: finished, started or new. Runs nothing.

A stage folder gets `STARTED` at the first attempt, then `result.json`, and `DONE` last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

from pipelines.lease import LeaseTaken, is_leased, leased
from pipelines.settings.sections import TrackingConfig
from pipelines.settings.tracking import without_password
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store
from pipelines.versions import commit, source_sha256

STAGES_OF_PLAN = "-stages.json"
"""End of the names of the files that `remember_plan` writes."""
StageState = Literal["done", "started", "new"]


class StageBusy(ValueError):
    """Raised if another process works on the same stage."""

    exit_code = 2


@contextlib.contextmanager
def claim(store: Store, spec: StageSpec) -> Iterator[None]:
    """Lets only this process work on a stage. Raises StageBusy if another one does."""
    with locked(store, spec.folder, spec.name):
        yield


@contextlib.contextmanager
def locked(store: Store, path: str, name: str) -> Iterator[None]:
    """Locks a folder for this process. Raises StageBusy if another process holds it.

    Under a local root it is a lock that ends with the process; under a remote one a lease, which
    ends a minute after a process that was killed.
    """
    folder = store.local_path(path)
    if folder is None:
        try:
            with leased(store, path):
                yield
        except LeaseTaken as taken:
            raise StageBusy(
                f"another process works on {name} in {store.join(path)} ({taken.owner}): wait for "
                "it, then run again"
            ) from None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "LOCK").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageBusy(
                f"another process works on {name} in {folder}: wait for it, then run again"
            ) from None
        yield


def is_locked(store: Store, path: str) -> bool:
    """Returns whether a process holds the lock of a folder, or its lease."""
    folder = store.local_path(path)
    if folder is None:
        return is_leased(store, path)
    try:
        with (folder / "LOCK").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def stage_state(store: Store, spec: StageSpec, tracking_uri: str | None) -> StageState:
    """Returns `done` if the stage's folder holds a complete result with the stage's key.

    A registration is `done` only for the tracking server and the model's name that have it.
    """
    if not store.exists(f"{spec.folder}/DONE"):
        return "started" if store.exists(f"{spec.folder}/STARTED") else "new"
    if not store.exists(f"{spec.folder}/result.json"):
        return "started"
    done, result = _read_done(store, spec), store.read_bytes(f"{spec.folder}/result.json")
    if done != {"key": spec.key, "result_sha256": hashlib.sha256(result).hexdigest()}:
        return "started"
    if spec.kind == "register" and not _is_registered(json.loads(result), spec, tracking_uri):
        return "started"
    return "done"


def mark_started(store: Store, spec: StageSpec, made_with: Mapping[str, Any] | None = None) -> None:
    """Records the key, the config and the code of a stage that is about to run.

    `made_with` holds further entries on packages and code.
    """
    store.delete(f"{spec.folder}/DONE")
    code = {"commit": commit(), "source_sha256": source_sha256(), **(made_with or {})}
    begun = {"key": spec.key, "recipe": spec.recipe, **code, "config": spec.config}
    store.write_json(f"{spec.folder}/STARTED", begun)


def find_same_recipe(
    store: Store, spec: StageSpec, recipes: Set[str], tracking_uri: str | None
) -> StageSpec | None:
    """Returns the stage with the newest finished result of one of these recipes, made elsewhere.

    It has the folder and key of that result, and `adopted_for` is the stage's own folder. Returns
    None if there is no such result. A registration is never adopted.
    """
    above, _, name = spec.folder.rpartition("/")
    own = re.compile(re.escape(name[: -len(spec.key[:12])]) + r"[0-9a-f]{12}")
    found = []
    for sibling in filter(own.fullmatch, store.list(above)) if spec.kind != "register" else ():
        begun = f"{above}/{sibling}/STARTED"
        record = store.read_json(begun) if store.exists(begun) else {}
        if record.get("recipe") in recipes:
            other = replace(
                spec, folder=f"{above}/{sibling}", key=record["key"], adopted_for=spec.folder
            )
            if stage_state(store, other, tracking_uri) == "done":
                found.append(other)
    return max(found, key=lambda other: store.modified(f"{other.folder}/DONE"), default=None)


def mark_adopted(store: Store, spec: StageSpec) -> None:
    """Records in the stage's own folder which result it has adopted. It lies beside it."""
    beside = spec.folder.rpartition("/")[2]
    store.write_json(f"{spec.adopted_for}/ADOPTED", {"key": spec.key, "folder": beside})


def read_adopted(store: Store, spec: StageSpec) -> StageSpec | None:
    """Returns the stage as an earlier run adopted it; None if it has a result of its own."""
    note = f"{spec.folder}/ADOPTED"
    if not store.exists(note) or store.exists(f"{spec.folder}/DONE"):
        return None
    record = store.read_json(note)
    # Earlier code wrote the whole address, of a root that may have been moved or copied since.
    folder = f"{spec.folder.rpartition('/')[0]}/{record['folder'].rpartition('/')[2]}"
    other = replace(spec, folder=folder, key=record["key"], adopted_for=spec.folder)
    return other if store.exists(f"{other.folder}/DONE") else None


def made_by(store: Store, spec: StageSpec) -> str:
    """Returns the commit that a stage's folder records; "" if it records none."""
    begun = f"{spec.folder}/STARTED"
    text: str = store.read_json(begun).get("commit", "") if store.exists(begun) else ""
    return text


def mark_done(
    store: Store, spec: StageSpec, result: Mapping[str, Any], tracking_uri: str | None
) -> dict[str, Any]:
    """Writes the result, then DONE. Returns the result as `read_result` will."""
    written = dict(result)
    if spec.kind == "register":
        written["tracking"] = _server(tracking_uri)
    store.write_json(f"{spec.folder}/result.json", written)
    digest = hashlib.sha256(store.read_bytes(f"{spec.folder}/result.json")).hexdigest()
    store.write_json(f"{spec.folder}/DONE", {"key": spec.key, "result_sha256": digest})
    return written


def read_result(store: Store, spec: StageSpec) -> dict[str, Any]:
    """Returns the result of a finished stage."""
    result: dict[str, Any] = store.read_json(f"{spec.folder}/result.json")
    return result


def remember_plan(
    store: Store, plan_key: str, config_name: str, specs: Sequence[StageSpec]
) -> None:
    """Records the stages of a plan and the time of its run, for `mantis ls` and `mantis clean`.

    Of the plans of one config name the newest counts as current; a plan without one always does.
    """
    folders = {spec.adopted_for or spec.folder for spec in specs} | {spec.folder for spec in specs}
    stages = sorted(folder.removeprefix(f"{store.root}/") for folder in folders)
    record = {"plan_key": plan_key, "config": config_name, "stages": stages, "used": time.time()}
    store.write_json(f"plans/{plan_key[:12]}{STAGES_OF_PLAN}", record)


def remember_run(store: Store, plan_key: str, run_id: str | None, tracking: TrackingConfig) -> None:
    """Stores the run id of a plan, so a later run finds it without MLflow."""
    uri = tracking.uri or ""
    record = {"plan_key": plan_key, "run_id": run_id, "store": without_password(uri, uri)}
    record |= _place(tracking)
    store.write_json(_run_file(plan_key), record)


def recall_run(store: Store, plan_key: str, tracking: TrackingConfig) -> str | None:
    """Returns the run id that `remember_run` stored for this experiment and server, or None."""
    if not store.exists(_run_file(plan_key)):
        return None
    record = store.read_json(_run_file(plan_key))
    place = _place(tracking)
    if any(record.get(name, value) != value for name, value in place.items()):
        return None
    run_id: str | None = record["run_id"]
    return run_id


def recorded_in(store: Store) -> str:
    """Returns the MLflow store of the last run below a root, "" if it is the root's own."""
    plans = [f"plans/{name}" for name in store.list("plans")]
    last = max(plans, key=store.modified, default=None)
    place: str = store.read_json(last).get("store", "") if last else ""
    return place


def _run_file(plan_key: str) -> str:
    return f"plans/{plan_key[:12]}.json"


def _read_done(store: Store, spec: StageSpec) -> Any:
    try:
        return store.read_json(f"{spec.folder}/DONE")
    except ValueError:
        return None


def _is_registered(result: Mapping[str, Any], spec: StageSpec, tracking_uri: str | None) -> bool:
    model = result.get("model", "").removeprefix("models:/").rpartition("/")[0]
    return bool(
        result.get("tracking") == _server(tracking_uri) and model == spec.settings.tracking.model
    )


def _place(tracking: TrackingConfig) -> dict[str, str]:
    """Returns what says where a run is recorded. Records of earlier code lack it."""
    return {"experiment": tracking.experiment, "tracking": _server(tracking.uri)}


def _server(tracking_uri: str | None) -> str:
    """Returns a digest that identifies a server. The URI itself may contain a password."""
    return hashlib.sha256((tracking_uri or "").encode()).hexdigest()[:12]
