"""Opens, finds and closes MLflow runs in the driver. Knows no Ray, no stages and no registry.

There is one run per pipeline and one per stage key, which is reused. Work continues while MLflow
does not answer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Param, Run

from pipelines.settings.tracking import sqlite_uri, without_password
from pipelines.storage import local_root, spool_folder
from pipelines.tracking.metric_writer import (
    MAX_BATCH,
    MetricWriter,
    finite,
    log_record,
    mlflow_key,
    now_ms,
)
from pipelines.tracking.store.client import (
    TRACKING_FAILURES,
    TrackingError,
    bounded_client,
    check_access,
    experiment_of,
    explain,
    is_missing,
    is_refusal,
    writing,
)
from pipelines.tracking.store.moved import ARTIFACTS, artifact_address
from pipelines.versions import provenance

T = TypeVar("T")
logger = logging.getLogger(__name__)
OPENED = "mantis.opened_ms"
"""The tag of a pipeline's run with the time it was last opened, in milliseconds since 1970."""
UPSTREAM = "mantis.upstream_keys"
KEYS_PER_TAG = 100
"""Keys in one tag. MLflow cuts a tag at 8,000 characters, so further keys have tags of their own,
such as `mantis.upstream_keys.1`."""


@dataclass(frozen=True)
class TrackingLocation:
    """The locations of MLflow's runs, of its artifacts, of the stages and of the spool.

    `artifact_root` is None if the server decides. `root` is the storage root, None for a command
    that only knows a server. A `private_spool` is in the user's cache.
    """

    uri: str
    artifact_root: str | None
    spool_folder: Path
    root: str | None = None
    private_spool: bool = False


def locate_tracking(uri: str | None, root: str) -> TrackingLocation:
    """Returns the locations for the configured `uri`; None means SQLite under a local `root`.

    Raises TrackingError for a remote root without a URI, because SQLite needs a local file.
    """
    local = local_root(root)
    folder = None if local is None else local.resolve()
    if uri is None:
        if folder is None:
            raise TrackingError(
                f"storage.root is {root!r}, and the default MLflow store needs a local folder. "
                "Set tracking.uri or MLFLOW_TRACKING_URI to an MLflow server (http://...), or "
                "tracking.enabled to false."
            )
        uri = sqlite_uri(folder / "mlflow.db")
    artifacts = None
    if not uri.startswith("http"):
        artifacts = root if folder is None else artifact_address(folder / ARTIFACTS)
    return TrackingLocation(uri, artifacts, spool_folder(root), root, private_spool=folder is None)


class Tracker:
    """Opens and closes runs.

    While MLflow does not answer, methods return None, and one note says so. After such a failure
    MLflow is not called again for `retry_after_s` seconds.
    """

    def __init__(
        self,
        location: TrackingLocation,
        experiment: str,
        *,
        model: str = "mantis",
        enabled: bool = True,
        note: Callable[[str], None] = logger.warning,
        retry_after_s: float = 60.0,
    ):
        self.location = location
        self.experiment = experiment
        self.model = model
        self.enabled = enabled
        self.available = enabled
        self.was_away = False  # True after any failed call, so MLflow may lack data
        self.retry_after_s = retry_after_s
        self._retry_at = 0.0
        self.note = note
        self._experiment_id: str | None = None
        self._open: set[str] = set()

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, whose calls time out."""
        return bounded_client(self.location.uri)

    @property
    def place(self) -> str:
        """Returns the URI without its password, for messages."""
        return without_password(self.location.uri, self.location.uri)

    @property
    def experiment_id(self) -> str:
        """Returns the id of the experiment, which is created if it does not exist.

        The first access initialises the store, so only code that writes asks for it. Raises
        TrackingError if the experiment was deleted.
        """
        if self._experiment_id is None:
            with writing(self.location.uri) as client:
                artifacts = self.location.artifact_root
                self._experiment_id = experiment_of(client, self.experiment, artifacts)
        return self._experiment_id

    def within(self, pipeline: Run) -> Tracker:
        """Returns a tracker of the experiment and of the model's name of a pipeline's run."""
        model = pipeline.data.tags.get("mantis.model", self.model)
        found = Tracker(self.location, self.experiment, model=model, note=self.note)
        found._experiment_id = pipeline.info.experiment_id
        return found

    def open_pipeline(self, name: str, settings: Mapping[str, Any], plan_key: str) -> str | None:
        """Opens or creates the pipeline run of `plan_key` and logs `settings` as its parameters.

        The section `tracking` is left out, because its URI may contain a password.
        """
        params = {section: value for section, value in settings.items() if section != "tracking"}
        tags = {"mantis.pipeline_key": plan_key, "mantis.name": name, "mantis.model": self.model}

        def open_run() -> str:
            run_id = self._open_run(name, "mantis.pipeline_key", plan_key, tags, params, "RUNNING")
            for tag, value in ((OPENED, str(now_ms())), ("mantis.model", self.model)):
                self.client.set_tag(run_id, tag, value)
            return run_id

        return self.attempt(open_run)

    def open_stage(
        self,
        parent_id: str | None,
        name: str,
        key: str,
        params: Mapping[str, Any],
        *,
        folder: str,
        upstream_keys: Sequence[str] = (),
        finished: bool = False,
        adopted: bool = False,
    ) -> str | None:
        """Opens or creates the run of stage `key` and replays its spooled metrics.

        `folder` is the URI of the stage's files. `finished` marks a stage that is skipped because
        it is done; MLflow may not have its run yet. `adopted` tags the parent run: this stage was
        trained by other code or packages.
        """

        def open_run() -> str:
            tags = {
                "mantis.stage_key": key,
                "mantis.stage": name,
                **upstream_tags(upstream_keys),
            }
            if parent_id is not None:
                tags["mlflow.parentRunId"] = parent_id
            status = "FINISHED" if finished else "RUNNING"
            run_id = self._open_run(name, "mantis.stage_key", key, tags, params, status)
            self._settle(run_id, parent_id, self._folder_tags(folder))
            if parent_id is not None:
                self.client.set_tag(parent_id, mlflow_key(f"mantis.stage_run.{name}"), run_id)
                if adopted:
                    self.client.set_tag(parent_id, mlflow_key(f"mantis.adopted.{name}"), key)
            self.metric_writer(run_id, key).replay()
            return run_id

        return self.attempt(open_run)

    def open_run(
        self,
        name: str,
        identity: tuple[str, str],
        *,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> str | None:
        """Opens or creates a run of another kind, such as a search or a trial.

        `identity` is the tag and value by which the run is found again.
        """
        tag, value = identity
        return self.attempt(
            lambda: self._open_run(name, tag, value, {**tags, tag: value}, params, "RUNNING")
        )

    def metric_writer(self, run_id: str | None, key: str) -> MetricWriter:
        """Returns a writer for the metrics of a run. `key` names its spool file."""
        spool = self.location.spool_folder / f"{key}.jsonl" if self.enabled else None
        private = self.location.private_spool
        return MetricWriter(self.location.uri, run_id, spool, private=private)

    def finish(
        self,
        run_id: str | None,
        status: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Ends a run with `status` FINISHED, FAILED or KILLED. Logs `metrics` that are new."""

        def end() -> None:
            assert run_id is not None
            run = self.client.get_run(run_id)
            for key, value in (tags or {}).items():
                self.client.set_tag(run_id, mlflow_key(key), value)
            results = finite(metrics or {})
            news = {name: v for name, v in results.items() if run.data.metrics.get(name) != v}
            if news:
                step = int(run.data.tags.get("mantis.last_step", 0))
                record = {"step": step, "timestamp": now_ms(), "metrics": news}
                log_record(self.client, run_id, record, mark_step=False)
            if stage_key := run.data.tags.get("mantis.stage_key"):
                self.metric_writer(run_id, stage_key).replay()
            self.client.set_terminated(run_id, status)
            self._open.discard(run_id)

        if run_id is not None:
            self.attempt(end)

    def close(self, status: str) -> None:
        """Ends every run that this tracker opened and that is still open, as on an interrupt."""
        for run_id in sorted(self._open):
            self.finish(run_id, status)

    def find_run(self, identity: str, key: str) -> Run | None:
        """Returns the run whose tag `identity` has the value `key`, or None."""
        experiment = [self.experiment_id]  # first: it creates a new store alone among processes
        found = self.client.search_runs(experiment, f"tags.`{identity}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _open_run(
        self,
        name: str,
        identity: str,
        key: str,
        tags: dict[str, str],
        params: Mapping[str, Any],
        status: str,
    ) -> str:
        run = self.find_run(identity, key)
        if run is None:
            tags = {**tags, **provenance()}
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        run_id: str = run.info.run_id
        news = {k: v for k, v in flatten(params).items() if k not in run.data.params}
        batch = [Param(k, v) for k, v in news.items()]
        for start in range(0, len(batch), MAX_BATCH):
            self.client.log_batch(run_id, params=batch[start : start + MAX_BATCH])
        if status == "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
            self._open.add(run_id)
        elif run.info.status != status:
            self.client.set_terminated(run_id, status)
        return run_id

    def _folder_tags(self, folder: str) -> dict[str, str]:
        """Returns a stage's folder, relative to the root if it is below it, and the root."""
        root = self.location.root
        if root is None or not folder.startswith(f"{root}/"):
            return {"mantis.folder": folder}
        return {"mantis.folder": folder.removeprefix(f"{root}/"), "mantis.root": root}

    def _settle(self, run_id: str, parent_id: str | None, tags: dict[str, str]) -> None:
        """Sets tags of a stage's run that differ, and its parent if it has none.

        A run first opened while MLflow had no run of the pipeline has none.
        """
        known = self.client.get_run(run_id).data.tags
        if parent_id is not None and "mlflow.parentRunId" not in known:
            tags = {**tags, "mlflow.parentRunId": parent_id}
        for name, value in tags.items():
            if known.get(name) != value:
                self.client.set_tag(run_id, name, value)

    def check_access(self) -> None:
        """Raises TrackingError if the server refuses this client. One that is away costs a note."""
        self.attempt(lambda: check_access(self.location.uri))

    def ask_again(self) -> None:
        """Lets the next call try MLflow, even a moment after a failure."""
        self._retry_at = 0.0

    def attempt(self, operation: Callable[[], T]) -> T | None:
        """Returns the result of `operation`, or None if tracking is off or MLflow does not answer.

        The first failure in a row prints a note.
        """
        if not self.enabled or time.monotonic() < self._retry_at:
            return None
        try:
            result = operation()
        except TRACKING_FAILURES as error:
            if self.available:
                self.note(
                    f"{explain(error, self.location.uri)}. Work continues; metrics are kept and "
                    "the next `mantis run` sends them."
                )
            self.available, self.was_away = False, True
            if not (is_refusal(error) or is_missing(error)):
                self._retry_at = time.monotonic() + self.retry_after_s
            return None
        self.available = True
        return result


def upstream_tags(keys: Sequence[str]) -> dict[str, str]:
    """Returns the tags that hold the keys of a stage's ancestors."""
    starts = range(0, max(len(keys), 1), KEYS_PER_TAG)
    return {
        f"mantis.upstream_keys{f'.{n}' if n else ''}": json.dumps(
            list(keys[at : at + KEYS_PER_TAG])
        )
        for n, at in enumerate(starts)
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested settings to MLflow parameters such as `tasks.0.name`.

    A list of scalars stays one value.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[mlflow_key(name)] = value if isinstance(value, str) else json.dumps(value)
    return flat
