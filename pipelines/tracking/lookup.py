"""Finds pipelines, stages and runs in MLflow. Creates nothing there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException

from pipelines.storage import Store
from pipelines.tracking.runs import OPENED, UPSTREAM, Tracker, TrackingLocation
from pipelines.tracking.store.client import TrackingError, asking, is_missing

PIPELINES = "tags.`mantis.pipeline_key` != ''"


@dataclass(frozen=True)
class StageRun:
    """The MLflow run of one stage, with the location of its files and the keys of its ancestors."""

    name: str
    key: str
    run_id: str
    status: str
    folder: str
    upstream_keys: tuple[str, ...]


def find_pipeline(tracker: Tracker, run: str, experiment: str | None = None) -> Run:
    """Returns the pipeline or trial run with id `run`, or for "latest" the last pipeline run.

    That is the one that was started or resumed last, in `experiment` or, for None, in any active
    experiment of the store. Raises TrackingError if there is none or the store cannot be read.
    """
    with asking(tracker.location.uri) as client:
        if run == "latest":
            return _latest(tracker, client, experiment)
        try:
            result = client.get_run(run)
        except MlflowException as error:
            if not is_missing(error):
                raise
            raise TrackingError(
                f"there is no run {run!r} in {tracker.place} ({error.message}). Give the id of a "
                "pipeline run or `latest`, or give another --root."
            ) from error
        if "mantis.arm" in result.data.tags:  # it lies below its evaluation, that below a pipeline
            result = client.get_run(result.data.tags["mlflow.parentRunId"])
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
    with asking(tracker.location.uri):
        found = tracker.find_run("mantis.stage_key", key)
    return found.info.run_id if found else None


def stages(tracker: Tracker, pipeline: Run) -> dict[str, StageRun]:
    """Returns the stage runs of a pipeline by name, with those it shares with other pipelines.

    Raises TrackingError if the store cannot be read.
    """
    prefix = "mantis.stage_run."
    with asking(tracker.location.uri) as client:
        runs = [
            client.get_run(run_id)
            for tag, run_id in sorted(pipeline.data.tags.items())
            if tag.startswith(prefix)
        ]
    runs.sort(key=lambda run: run.info.start_time)
    return {run.data.tags["mantis.stage"]: _stage_run(run, tracker.location) for run in runs}


def stage_folder(location: TrackingLocation, tags: Mapping[str, str]) -> str:
    """Returns the folder of a stage from the tags of its run.

    Below a known root with stages it is found by its relative folder, or by its name and key: the
    root may have been moved or copied since. Otherwise the tags say it. Those of earlier runs hold
    an absolute folder, later ones a folder relative to `mantis.root`.
    """
    recorded, made_below = tags["mantis.folder"], tags.get("mantis.root")
    if location.root is not None and (store := Store(location.root)).exists("stages"):
        if made_below is not None or recorded.startswith(f"{store.root}/"):
            return store.join(recorded)
        return store.join("stages", f"{tags['mantis.stage']}-{tags['mantis.stage_key'][:12]}")
    return recorded if made_below is None else f"{made_below}/{recorded}"


def upstream_keys(tags: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the keys of a stage's ancestors from the tags of its run.

    Earlier code wrote one tag, which MLflow cut short if there were many: the whole keys in it
    count.
    """
    keys: list[str] = []
    for number in range(len(tags)):
        text = tags.get(UPSTREAM + (f".{number}" if number else ""))
        if text is None:
            break
        try:
            keys += json.loads(text)
        except ValueError:
            keys += re.findall(r'"([^"]*)"', text)
    return tuple(keys)


def _latest(tracker: Tracker, client: MlflowClient, experiment: str | None) -> Run:
    known = _experiments(client)
    chosen = [each for each in known if experiment in (None, each.name)]
    found = _last_run(client, chosen)
    if found is not None:
        return found
    others = [each.name for each in known if each not in chosen and _last_run(client, [each])]
    where = f"experiment {experiment!r} of " if experiment is not None else ""
    advice = "Start one with `mantis run --config ...`, or give another --root."
    if others:
        advice = f"These experiments have runs: {', '.join(sorted(others))}. Name one of them by "
        advice += "--experiment, or leave out --experiment and MLFLOW_EXPERIMENT_NAME."
    raise TrackingError(f"there is no pipeline run in {where}{tracker.place}. {advice}")


def _experiments(client: MlflowClient) -> list[Experiment]:
    found: list[Experiment] = []
    page = client.search_experiments()
    while True:
        found += page
        if not page.token:
            return found
        page = client.search_experiments(page_token=page.token)


def _last_run(client: MlflowClient, experiments: Sequence[Experiment]) -> Run | None:
    """Returns the pipeline run that was opened last."""
    if not experiments:
        return None
    ids = [each.experiment_id for each in experiments]
    order = [f"tags.`{OPENED}` DESC", "attributes.start_time DESC"]
    found = client.search_runs(ids, PIPELINES, order_by=order, max_results=1)
    return found[0] if found else None


def _stage_run(run: Run, location: TrackingLocation) -> StageRun:
    tags = run.data.tags
    return StageRun(
        name=tags["mantis.stage"],
        key=tags["mantis.stage_key"],
        run_id=run.info.run_id,
        status=run.info.status,
        folder=stage_folder(location, tags),
        upstream_keys=upstream_keys(tags),
    )
