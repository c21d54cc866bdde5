"""Finds pipelines, stages and runs in MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipelines.tracking.runs import Tracker, TrackingError


@dataclass(frozen=True)
class StageRun:
    """The MLflow run of one stage, with the location of its files and the keys of its ancestors."""

    name: str
    key: str
    run_id: str
    status: str
    folder: str
    upstream_keys: tuple[str, ...]


def find_pipeline(tracker: Tracker, run: str) -> Run:
    """Returns the pipeline or trial run with id `run`, or the newest pipeline run for "latest".

    Raises TrackingError if there is none.
    """
    if run == "latest":
        found = tracker.client.search_runs(
            [tracker.experiment_id],
            "tags.`mantis.pipeline_key` != ''",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if not found:
            raise TrackingError(
                f"there is no run in experiment {tracker.experiment!r} of {tracker.place}. Start "
                "one with `mantis run --config ...`, or give another --root."
            )
        return found[0]
    try:
        result = tracker.client.get_run(run)
    except MlflowException as error:
        raise TrackingError(
            f"there is no run {run!r} in {tracker.place} ({error.message}). "
            "Give the id of a pipeline run or `latest`, or give another --root."
        ) from error
    if "mantis.arm" in result.data.tags:  # an arm lies below its evaluation, that below a pipeline
        result = tracker.client.get_run(result.data.tags["mlflow.parentRunId"])
    if "mantis.search_key" in result.data.tags:
        raise TrackingError(
            f"run {run} is a search. Give the run of one of its trials, or register its front "
            "with `mantis tune ... --resume --register`."
        )
    if not result.data.tags.keys() & {"mantis.pipeline_key", "mantis.trial_key"}:
        parent = result.data.tags.get("mlflow.parentRunId", "unknown")
        raise TrackingError(f"run {run} is a single stage or arm. Give its pipeline run: {parent}.")
    return result


def stage_run_id(tracker: Tracker, key: str) -> str | None:
    """Returns the id of the run with this stage key, or None if MLflow has none."""
    found = tracker.find_run("mantis.stage_key", key)
    return found.info.run_id if found else None


def stages(tracker: Tracker, pipeline: Run) -> dict[str, StageRun]:
    """Returns the stage runs of a pipeline by name, with those it shares with other pipelines."""
    prefix = "mantis.stage_run."
    runs = [
        tracker.client.get_run(run_id)
        for tag, run_id in sorted(pipeline.data.tags.items())
        if tag.startswith(prefix)
    ]
    runs.sort(key=lambda run: run.info.start_time)
    return {run.data.tags["mantis.stage"]: _stage_run(run) for run in runs}


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
