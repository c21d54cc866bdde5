"""Opens, finds and closes MLflow runs in the driver. Knows no Ray, no stages and no registry.

There is one run per pipeline and one per stage key, which is reused. Work continues while MLflow
does not answer.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Param, Run

from pipelines.tracking.metric_writer import (
    MAX_BATCH,
    TRACKING_FAILURES,
    MetricWriter,
    bounded_client,
    failure_text,
    finite,
    log_record,
    mlflow_key,
    now_ms,
    without_password,
)
from pipelines.versions import provenance

T = TypeVar("T")
logger = logging.getLogger(__name__)
# MLflow's pages else take the experiment for one of prompts and hide the columns of models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(ValueError):
    """Raised if a tracking setting or a run cannot be used. The message says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class TrackingLocation:
    """The locations of MLflow's runs, of its artifacts and of the spool.

    `artifact_root` is None if the server decides.
    """

    uri: str
    artifact_root: str | None
    spool_folder: Path


def locate_tracking(uri: str | None, root: str) -> TrackingLocation:
    """Returns the locations for the configured `uri`; None means sqlite under a local `root`.

    Raises TrackingError for a remote root without a URI, because sqlite needs a local file.
    """
    remote = "://" in root and not root.startswith("file://")
    local_root = None if remote else Path(root.removeprefix("file://")).resolve()
    if uri is None:
        if local_root is None:
            raise TrackingError(
                f"storage.root is {root!r}, and the default MLflow store needs a local folder. "
                "Set tracking.uri to an MLflow server (http://...) or tracking.enabled to false."
            )
        uri = f"sqlite:///{local_root / 'mlflow.db'}"
    spool_folder = (local_root or Path(tempfile.gettempdir()) / "mantis") / "spool"
    if uri.startswith("http"):
        return TrackingLocation(uri, None, spool_folder)
    return TrackingLocation(
        uri, str(local_root / "mlartifacts") if local_root else root, spool_folder
    )


class Tracker:
    """Opens and closes runs.

    While MLflow does not answer, methods return None, and one note says so.
    """

    def __init__(
        self,
        location: TrackingLocation,
        experiment: str,
        *,
        enabled: bool = True,
        note: Callable[[str], None] = logger.warning,
    ):
        self.location = location
        self.experiment = experiment
        self.enabled = enabled
        self.available = enabled
        self.was_away = False  # True after any failed call, so MLflow may lack data
        self._note = note
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

        The first access initialises the store, so no other code looks up the experiment. Raises
        TrackingError if the experiment was deleted.
        """
        if self._experiment_id is None:
            client = self.client
            found = client.get_experiment_by_name(self.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"the MLflow experiment {self.experiment!r} was deleted. Restore it "
                    f"(mlflow experiments restore -x {found.experiment_id}) or set "
                    "tracking.experiment to another name."
                )
            self._experiment_id = str(
                found.experiment_id
                if found is not None
                else client.create_experiment(
                    self.experiment, self.location.artifact_root, tags=EXPERIMENT_TAGS
                )
            )
        return self._experiment_id

    def open_pipeline(self, name: str, settings: Mapping[str, Any], plan_key: str) -> str | None:
        """Opens or creates the pipeline run of `plan_key` and logs `settings` as its parameters.

        The section `tracking` is left out, because its URI may contain a password.
        """
        params = {section: value for section, value in settings.items() if section != "tracking"}
        tags = {"mantis.pipeline_key": plan_key, "mantis.name": name}
        return self.attempt(
            lambda: self._open_run(name, "mantis.pipeline_key", plan_key, tags, params, "RUNNING")
        )

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
                "mantis.folder": folder,
                "mantis.upstream_keys": json.dumps(list(upstream_keys)),
            }
            if parent_id is not None:
                tags["mlflow.parentRunId"] = parent_id
            status = "FINISHED" if finished else "RUNNING"
            run_id = self._open_run(name, "mantis.stage_key", key, tags, params, status)
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
        return MetricWriter(self.location.uri, run_id, spool)

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
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{identity}` = '{key}'", max_results=1
        )
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

    def attempt(self, operation: Callable[[], T]) -> T | None:
        """Returns the result of `operation`, or None if tracking is off or MLflow does not answer.

        The first failure in a row prints a note.
        """
        if not self.enabled:
            return None
        try:
            result = operation()
        except TRACKING_FAILURES as error:
            if self.available:
                self._note(
                    f"MLflow at {self.place} does not answer "
                    f"({failure_text(error, self.location.uri)}). Work continues; metrics are kept "
                    "and the next `mantis run` sends them."
                )
            self.available, self.was_away = False, True
            return None
        self.available = True
        return result


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
