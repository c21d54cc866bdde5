"""What the files under the root say of stages and runs: finished, begun or new. Runs nothing.

A stage folder holds `STARTED` from its first attempt on, `result.json`, and `DONE`, written last.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pipelines.plan import StageSpec
from pipelines.storage import Store

StageState = Literal["done", "started", "new"]


class StageBusy(ValueError):
    """Another process works on the same stage."""

    exit_code = 2


@contextlib.contextmanager
def claim(store: Store, spec: StageSpec) -> Iterator[None]:
    """Under a local root, one process at a time works on a stage; a crash lets go too.

    Raises StageBusy.
    """
    with locked(store, spec.folder, spec.name):
        yield


@contextlib.contextmanager
def locked(store: Store, path: str, name: str) -> Iterator[None]:
    """Under a local root, one process at a time works in a folder. Raises StageBusy."""
    folder = store.local_path(path)
    if folder is None:
        yield
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


def stage_state(store: Store, spec: StageSpec, tracking_uri: str | None) -> StageState:
    """Whether the stage's folder holds a whole result of this very key.

    A registration counts only for the tracking server it went to.
    """
    if not store.exists(f"{spec.folder}/DONE"):
        return "started" if store.exists(f"{spec.folder}/STARTED") else "new"
    if not store.exists(f"{spec.folder}/result.json"):
        return "started"
    done, result = _read_done(store, spec), store.read_bytes(f"{spec.folder}/result.json")
    if done != {"key": spec.key, "result_sha256": hashlib.sha256(result).hexdigest()}:
        return "started"
    elsewhere = json.loads(result).get("tracking") != _server(tracking_uri)
    return "started" if spec.kind == "register" and elsewhere else "done"


def mark_started(store: Store, spec: StageSpec) -> None:
    store.delete(f"{spec.folder}/DONE")
    store.write_json(
        f"{spec.folder}/STARTED", {"key": spec.key, "recipe": spec.recipe, "config": spec.config}
    )


def mark_done(
    store: Store, spec: StageSpec, result: Mapping[str, Any], tracking_uri: str | None
) -> dict[str, Any]:
    """Writes the result, then DONE; returns the result as it will be read back."""
    written = dict(result)
    if spec.kind == "register":
        written["tracking"] = _server(tracking_uri)
    store.write_json(f"{spec.folder}/result.json", written)
    digest = hashlib.sha256(store.read_bytes(f"{spec.folder}/result.json")).hexdigest()
    store.write_json(f"{spec.folder}/DONE", {"key": spec.key, "result_sha256": digest})
    return written


def read_result(store: Store, spec: StageSpec) -> dict[str, Any]:
    """The result of a finished stage."""
    result: dict[str, Any] = store.read_json(f"{spec.folder}/result.json")
    return result


def remember_run(store: Store, plan_key: str, run_id: str | None) -> None:
    """Lets a later run of the same plan tell its run id without asking MLflow."""
    store.write_json(_run_file(plan_key), {"plan_key": plan_key, "run_id": run_id})


def recall_run(store: Store, plan_key: str) -> str | None:
    if not store.exists(_run_file(plan_key)):
        return None
    run_id: str | None = store.read_json(_run_file(plan_key))["run_id"]
    return run_id


def _run_file(plan_key: str) -> str:
    return f"plans/{plan_key[:12]}.json"


def _read_done(store: Store, spec: StageSpec) -> Any:
    try:
        return store.read_json(f"{spec.folder}/DONE")
    except ValueError:
        return None


def _server(tracking_uri: str | None) -> str:
    """Tells servers apart without writing down a password a URI may hold."""
    return hashlib.sha256((tracking_uri or "").encode()).hexdigest()[:12]
