"""Logs each arm of an evaluation as a run of its own, so MLflow's pages compare them.

The runs are below that of stage `evaluate`, which all pipelines with the same arms share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Dataset, LoggedModelInput, Param

from pipelines.tracking.lookup import StageRun
from pipelines.tracking.metric_writer import finite, log_record, now_ms
from pipelines.tracking.pages.datasets import log_inputs
from pipelines.tracking.pages.logged_models import find_checkpoint, tie_figures
from pipelines.tracking.runs import Tracker

ARM_KEY = "mantis.arm_key"
LOGGED = "mantis.arms"  # tag of the run of `evaluate`: the number of arms that have runs
PARAMS = ("kind", "label", "rate_weight", "level", "quality", "scale", "exit_confidence", "seed")
HEADLINES = ("val/top1", "val/miou", "val/bpp", "val/wire_bytes")


@dataclass(frozen=True)
class ArmRun:
    """An arm as `mantis lineage` lists it. `figures` are the headline figures it has."""

    name: str
    run_id: str
    figures: dict[str, float]


def log_arms(
    tracker: Tracker,
    evaluate_run_id: str,
    evaluate_key: str,
    evaluation: Mapping[str, Any],
    *,
    own_models: Mapping[str, str],
    dataset: Dataset | None,
) -> None:
    """Logs the arms of evaluation.json as runs below the run of `evaluate`.

    `own_models` maps the names of the arms that measure a checkpoint as it was trained to the key
    of its stage. Their figures are also those of the logged model of that stage.
    """
    client, arms = tracker.client, evaluation["arms"]
    if client.get_run(evaluate_run_id).data.tags.get(LOGGED) == str(len(arms)):
        return
    for arm in arms:
        run_id = _open(tracker, evaluate_run_id, evaluate_key, arm)
        figures = log_figures(tracker, run_id, arm["metrics"])
        if dataset is not None:
            log_inputs(tracker, run_id, {"val": dataset}, ("val",))
        key = own_models.get(arm["name"])
        model = find_checkpoint(tracker, key) if key else None
        if model is not None:
            client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
            tie_figures(client, run_id, model.model_id, figures, dataset)
        client.set_terminated(run_id, "FINISHED")
    client.set_tag(evaluate_run_id, LOGGED, str(len(arms)))


def log_figures(tracker: Tracker, run_id: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logs the finite numbers of `metrics` that a run does not have yet. Returns all of them."""
    figures = finite(metrics)
    known = tracker.client.get_run(run_id).data.metrics
    news = {name: value for name, value in figures.items() if known.get(name) != value}
    record = {"step": 0, "timestamp": now_ms(), "metrics": news}
    log_record(tracker.client, run_id, record, mark_step=False)
    return figures


def find_arms(tracker: Tracker, evaluate: StageRun | None) -> list[ArmRun]:
    """Returns the runs of the arms of an evaluation, in the order in which they were logged."""
    if evaluate is None:
        return []
    found = tracker.client.search_runs(
        [tracker.experiment_id],
        f"tags.`{ARM_KEY}` != '' AND tags.`mlflow.parentRunId` = '{evaluate.run_id}'",
        order_by=["attributes.start_time ASC"],
        max_results=10_000,
    )
    return [
        ArmRun(
            name=run.data.tags["mantis.arm"],
            run_id=run.info.run_id,
            figures={k: run.data.metrics[k] for k in HEADLINES if k in run.data.metrics},
        )
        for run in found
    ]


def _open(tracker: Tracker, evaluate_run_id: str, evaluate_key: str, arm: Mapping[str, Any]) -> str:
    """Returns the id of the run of an arm, which is created with its parameters if it is new."""
    client, key = tracker.client, f"{evaluate_key}/{arm['name']}"
    run = tracker.find_run(ARM_KEY, key)
    if run is None:
        tags = {ARM_KEY: key, "mantis.arm": arm["name"], "mlflow.parentRunId": evaluate_run_id}
        run = client.create_run(tracker.experiment_id, tags=tags, run_name=f"arm {arm['name']}")
    run_id: str = run.info.run_id
    params = [
        Param(name, str(arm[name]))
        for name in PARAMS
        if arm.get(name) is not None and name not in run.data.params
    ]
    client.log_batch(run_id, params=params)
    return run_id
