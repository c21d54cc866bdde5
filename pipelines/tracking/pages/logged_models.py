"""Lists checkpoints in MLflow as logged models, with figures that name the data they are of.

The weights stay under the storage root. Only a registered model has files in MLflow: registry.py
adds them to the logged model of its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, LoggedModel, LoggedModelOutput, Metric

from pipelines.tracking.metric_writer import MAX_BATCH, finite
from pipelines.tracking.runs import Tracker

STAGE_KEY = "mantis.stage_key"


def log_checkpoint(
    tracker: Tracker,
    run_id: str,
    *,
    stage: str,
    key: str,
    kind: str,
    location: str,
    params: Mapping[str, Any],
    figures: Mapping[str, Any],
    dataset: Dataset | None,
) -> str:
    """Lists the checkpoint of a finished training as the output of its run. Returns its model id.

    A stage `key` has one logged model. `location` is where the weights are. `figures` are those of
    `run_id`, which `dataset` gave.
    """
    client = tracker.client
    known = find_checkpoint(tracker, key)
    if known is None:
        known = client.create_logged_model(
            tracker.experiment_id,
            name=model_name(stage),
            source_run_id=run_id,
            model_type=kind,
            params={name: str(value) for name, value in params.items()},
            tags={STAGE_KEY: key, "mantis.stage": stage, "mantis.checkpoint": location},
        )
        client.finalize_logged_model(known.model_id, "READY")
        client.log_outputs(run_id, models=[LoggedModelOutput(known.model_id, step=0)])
    tie_figures(client, run_id, known.model_id, finite(figures), dataset)
    model_id: str = known.model_id
    return model_id


def find_checkpoint(tracker: Tracker, key: str) -> LoggedModel | None:
    """Returns the logged model of the stage with this key, or None."""
    found = tracker.client.search_logged_models(
        [tracker.experiment_id],
        f"tags.`{STAGE_KEY}` = '{key}' AND tags.`mantis.checkpoint` != ''",
        max_results=1,
    )
    return found[0] if found else None


def checkpoints(tracker: Tracker, keys: Collection[str]) -> dict[str, str]:
    """Returns the addresses of the logged models of these stages, `models:/m-...`, by key."""
    found: dict[str, str] = {}
    for key in sorted(keys):
        model = find_checkpoint(tracker, key)
        if model is not None:
            found[key] = f"models:/{model.model_id}"
    return found


def tie_figures(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    figures: Mapping[str, float],
    dataset: Dataset | None,
) -> None:
    """Ties figures that a run has to a model, and to the data they were measured on.

    They keep their step and time, so the run's curve gains no point. Those that the model has
    already, from this run or another, are left out.
    """
    logged = {(m.key, m.value) for m in client.get_logged_model(model_id).metrics or []}
    batch = []
    for name, value in figures.items():
        if (name, value) in logged:
            continue
        same = [m for m in client.get_metric_history(run_id, name) if m.value == value]
        if same:
            newest = max(same, key=lambda metric: (metric.step, metric.timestamp))
            batch.append(
                Metric(
                    name,
                    value,
                    newest.timestamp,
                    newest.step,
                    model_id=model_id,
                    dataset_name=dataset.name if dataset else None,
                    dataset_digest=dataset.digest if dataset else None,
                )
            )
    for start in range(0, len(batch), MAX_BATCH):
        client.log_batch(run_id, metrics=batch[start : start + MAX_BATCH])


def model_name(stage: str) -> str:
    """Returns the name of a stage without the characters that MLflow refuses in a model's name."""
    return re.sub(r"[/:.%\"']", "-", stage)
