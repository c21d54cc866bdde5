"""Gives runs and registered versions their descriptions, and ties figures to their data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Dataset

from pipelines.tracking.lookup import StageRun
from pipelines.tracking.metric_writer import finite
from pipelines.tracking.pages.datasets import datasets
from pipelines.tracking.pages.description import main_arm, run_description, version_description
from pipelines.tracking.pages.logged_models import tie_figures
from pipelines.tracking.runs import Tracker

DESCRIBED = "mantis.description_sha256"
"""Tag of a run or version: the hash of the description as it was written, to tell an edited one."""

LOGGED_MODEL = "mantis.logged_model"
"""Tag of a version: the id of its logged model, which MLflow's SQL store forgets."""

NOTE = "mlflow.note.content"  # MLflow's tag for the description of a run


def annotate(
    tracker: Tracker,
    part: str,
    version: tuple[str, str],
    tags: Mapping[str, str],
    evaluation: Mapping[str, Any],
    stages: Mapping[str, StageRun],
) -> None:
    """Writes the description of a version and the figures of its logged model.

    `version` is a registered name and a number, `part` what it holds of the codec. A description
    that somebody has edited since stays as it is.
    """
    client, (name, number) = tracker.client, version
    data = _evaluated_data(stages["prepare"].folder)
    found = client.get_model_version(name, number)
    if not found.description or found.tags.get(DESCRIBED) == _sha256(found.description):
        text = version_description(part, f"models:/{name}/{number}", tags, evaluation, data)
        client.update_model_version(name, number, description=text)
        client.set_model_version_tag(name, number, DESCRIBED, _sha256(text))
    measured_by = stages["evaluate"].run_id
    model_id = found.tags.get(LOGGED_MODEL)
    if model_id and measured_by:
        figures = finite(main_arm(evaluation, tags["mantis.stage_key"])["metrics"])
        tie_figures(client, measured_by, model_id, figures, data)


def describe_run(
    tracker: Tracker, run_id: str, evaluation: Mapping[str, Any], dataset: Dataset
) -> None:
    """Writes the figures of all arms into the description of a run, unless somebody edited it."""
    tags = tracker.client.get_run(run_id).data.tags
    present, text = tags.get(NOTE), run_description(evaluation, dataset)
    if not present or tags.get(DESCRIBED) == _sha256(present):
        tracker.client.set_tag(run_id, NOTE, text)
        tracker.client.set_tag(run_id, DESCRIBED, _sha256(text))


def _evaluated_data(prepared: str) -> Dataset | None:
    """Returns the data of the evaluation, or None if the prepared folder is gone."""
    from data_prep.errors import DataError
    from data_prep.manifest import read_manifest

    try:
        return datasets(read_manifest(prepared), prepared).get("val")
    except DataError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
