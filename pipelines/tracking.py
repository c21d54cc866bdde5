"""MLflow runs as the driver opens, finds and closes them: no Ray, no stages, no registry.

One run per pipeline, one per stage key for ever; MLflow being away never stops the work.
"""

import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException

from pipelines.metric_writer import (
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

logger = logging.getLogger(__name__)

DECIDING_PACKAGES = ("torch", "compressai", "constriction", "ray", "mlflow", "numpy")


class TrackingError(ValueError):
    """A tracking setting or run name that cannot be used; the message says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class TrackingLocation:
    """Where MLflow keeps runs (`uri`), artifacts (None: the server decides) and the spool."""

    uri: str
    artifact_root: str | None
    spool_folder: Path


@dataclass(frozen=True)
class StageRun:
    """What MLflow knows of one stage: enough to find its files and its ancestors."""

    name: str
    key: str
    run_id: str
    status: str
    folder: str
    upstream_keys: tuple[str, ...]


def locate_tracking(uri: str | None, root: str) -> TrackingLocation:
    """The configured `uri`, or sqlite under a local `root`.

    Raises TrackingError for a remote root without a URI: sqlite cannot live in an object store.
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
    """Opens and closes runs. Methods return None, and say so once, while MLflow is away."""

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
        self.was_away = False  # at any time: MLflow has missed something
        self._note = note
        self._experiment_id: str | None = None
        self._open: set[str] = set()

    @property
    def client(self) -> MlflowClient:
        return bounded_client(self.location.uri)

    @property
    def place(self) -> str:
        """The URI as a message may show it."""
        return without_password(self.location.uri, self.location.uri)

    @property
    def experiment_id(self) -> str:
        """The experiment's id; the first access initialises the store, so it happens here only."""
        if self._experiment_id is None:
            client = self.client
            found = client.get_experiment_by_name(self.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"the MLflow experiment {self.experiment!r} was deleted. Restore it "
                    f"(mlflow experiments restore -x {found.experiment_id}) or set "
                    "tracking.experiment to another name."
                )
            self._experiment_id = (
                found.experiment_id
                if found is not None
                else client.create_experiment(self.experiment, self.location.artifact_root)
            )
        return self._experiment_id

    def open_pipeline(self, name: str, settings: Mapping[str, Any], plan_key: str) -> str | None:
        """The parent run of `plan_key`, reopened or created; `settings` become its parameters.

        The `tracking` section is left out: its URI may hold a password.
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
    ) -> str | None:
        """The run of stage `key`, reopened or created, its spooled metrics replayed.

        `folder` is the URI of the stage's files. `finished` records a stage that is skipped
        because it is done, which may be one whose run MLflow has never seen.
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
        """A run of another kind (a search, a trial), known for ever by a tag: reopened or made."""
        tag, value = identity
        return self.attempt(
            lambda: self._open_run(name, tag, value, {**tags, tag: value}, params, "RUNNING")
        )

    def metric_writer(self, run_id: str | None, key: str) -> MetricWriter:
        """The writer a training stage's callback carries."""
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
        """End a run: FINISHED, FAILED or KILLED. `metrics` are results, logged once."""

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
            if key := run.data.tags.get("mantis.stage_key"):
                self.metric_writer(run_id, key).replay()
            self.client.set_terminated(run_id, status)
            self._open.discard(run_id)

        if run_id is not None:
            self.attempt(end)

    def close(self, status: str) -> None:
        """End every run this tracker opened and nobody finished, as on an interrupt."""
        for run_id in sorted(self._open):
            self.finish(run_id, status)

    def find_pipeline(self, run: str) -> Run:
        """The pipeline run with id `run`, or the newest one for "latest"; else TrackingError."""
        if run == "latest":
            found = self.client.search_runs(
                [self.experiment_id],
                "tags.`mantis.pipeline_key` != ''",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if not found:
                raise TrackingError(
                    f"no run yet in experiment {self.experiment!r} "
                    f"of {self.place}. Make one with "
                    "`mantis run --config ...`, or name another --root."
                )
            return found[0]
        try:
            result = self.client.get_run(run)
        except MlflowException as error:
            raise TrackingError(
                f"no run {run!r} in {self.place} ({error.message}). "
                "Give a pipeline run id or `latest`, or name another --root."
            ) from error
        if "mantis.search_key" in result.data.tags:
            raise TrackingError(
                f"run {run} is a search. Give one of its trials, or register its front with "
                "`mantis tune ... --resume --register`."
            )
        if not result.data.tags.keys() & {"mantis.pipeline_key", "mantis.trial_key"}:
            parent = result.data.tags.get("mlflow.parentRunId", "unknown")
            raise TrackingError(f"run {run} is one stage. Give its pipeline run: {parent}.")
        return result

    def stage_run_id(self, key: str) -> str | None:
        """The run of a stage key, if MLflow has seen that stage."""
        found = self._find_run("mantis.stage_key", key)
        return found.info.run_id if found else None

    def stages(self, pipeline: Run) -> dict[str, StageRun]:
        """The stage runs a pipeline used, its own and those it shares with others, by name."""
        prefix = "mantis.stage_run."
        runs = [
            self.client.get_run(run_id)
            for tag, run_id in sorted(pipeline.data.tags.items())
            if tag.startswith(prefix)
        ]
        runs.sort(key=lambda run: run.info.start_time)
        return {run.data.tags["mantis.stage"]: _stage_run(run) for run in runs}

    def _find_run(self, identity: str, key: str) -> Run | None:
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
        run = self._find_run(identity, key)
        if run is None:
            tags = {**tags, **_provenance()}
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

    def attempt(self, operation: Callable[[], Any]) -> Any:
        """What `operation` returns; None, said once, while MLflow is off or away."""
        if not self.enabled:
            return None
        try:
            result = operation()
        except TRACKING_FAILURES as error:
            if self.available:
                self._note(
                    f"MLflow at {self.place} does not answer "
                    f"({failure_text(error, self.location.uri)}). Work goes on; "
                    "metrics are kept and sent by the next `mantis run`."
                )
            self.available, self.was_away = False, True
            return None
        self.available = True
        return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: `tasks.0.name`; lists of scalars stay one value."""
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


def _stage_run(run: Run) -> StageRun:
    tags = run.data.tags
    return StageRun(
        name=tags["mantis.stage"],
        key=tags["mantis.stage_key"],
        run_id=run.info.run_id,
        status=run.info.status,
        folder=tags["mantis.folder"],
        upstream_keys=tuple(json.loads(tags["mantis.upstream_keys"])),
    )


def _provenance() -> dict[str, str]:
    versions = {package: metadata.version(package) for package in DECIDING_PACKAGES}
    tags = {"mantis.versions": json.dumps(versions), "mlflow.source.name": "mantis"}
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["mantis.uncommitted_changes"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags


def _git(*arguments: str) -> str:
    """The command's output; empty where the package runs outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
