"""Logs what MLflow shows of a finished stage beside its figures: data, checkpoint, arms, report.

`track_stage` may be called again for a stage: what MLflow has already stays as it is.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.stages.record import read_result
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store

if TYPE_CHECKING:
    from pipelines.tracking.pages.datasets import Dataset
    from pipelines.tracking.runs import Tracker

logger = logging.getLogger(__name__)


def track_stage(
    spec: StageSpec,
    *,
    specs: Mapping[str, StageSpec],
    store: Store,
    tracker: Tracker,
    run_id: str | None,
) -> None:
    """Logs a finished stage to its own run and to the run `run_id` of the pipeline or trial.

    Never raises: a finished stage counts, whatever MLflow says. Where MLflow is away nothing is
    tried, and the chain calls this again at its end.
    """
    if run_id is None or not tracker.available:
        return
    pipeline_id = run_id  # mypy forgets in the lambda that it is not None
    try:
        tracker.attempt(lambda: _track(spec, specs, store, tracker, pipeline_id))
    except Exception as error:
        logger.exception("what MLflow shows of %s was not logged", spec.name)
        tracker.note(
            f"MLflow does not show all of {spec.name} ({type(error).__name__}: {error}). Its "
            "result is whole and counts."
        )


def _track(
    spec: StageSpec,
    specs: Mapping[str, StageSpec],
    store: Store,
    tracker: Tracker,
    pipeline_id: str,
) -> None:
    from pipelines.tracking.lookup import stage_run_id
    from pipelines.tracking.pages.datasets import CONTEXTS, log_inputs

    known = _datasets(specs["prepare"])
    own_id = stage_run_id(tracker, spec.key)
    if spec.kind == "prepare":
        log_inputs(tracker, pipeline_id, known, tuple(CONTEXTS))
        tracker.client.log_text(pipeline_id, _config(spec), "config.yaml")
    elif spec.stage.trains and own_id is not None:
        log_inputs(tracker, own_id, known, ("train", "holdout"))
        _log_checkpoint(spec, store, tracker, own_id, known.get("holdout"))
    elif spec.kind == "evaluate" and own_id is not None:
        log_inputs(tracker, own_id, known, ("val",))
        _log_evaluation(spec, specs, store, tracker, own_id, pipeline_id, known["val"])


def _datasets(prepare: StageSpec) -> dict[str, Dataset]:
    from data_prep.manifest import read_manifest
    from pipelines.tracking.pages.datasets import datasets

    return datasets(read_manifest(prepare.folder), prepare.folder)


def _config(spec: StageSpec) -> str:
    """Returns the whole config as YAML, for people of other machines.

    The tracking URI is left out: it may hold a password. Of an absolute path the last name stays.
    """
    tracking = spec.settings.tracking.model_copy(update={"uri": None})
    shown = spec.settings.model_copy(update={"tracking": tracking}).model_dump(mode="json")
    note = "# Of each folder and file of the machine that ran this, only the last name is kept.\n"
    return note + yaml.safe_dump(_without_folders(shown), sort_keys=False, allow_unicode=True)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _log_checkpoint(
    spec: StageSpec, store: Store, tracker: Tracker, run_id: str, holdout: Dataset | None
) -> None:
    from pipelines.tracking.pages.logged_models import log_checkpoint

    result = read_result(store, spec)
    log_checkpoint(
        tracker,
        run_id,
        stage=spec.name,
        key=spec.key,
        kind="codec" if spec.kind in ("stage2", "extend") else spec.kind,
        location=f"{spec.folder.removeprefix(f'{store.root}/')}/{result['model_folder']}",
        params=_params(spec),
        figures={k: v for k, v in result["metrics"].items() if k.startswith("holdout/")},
        dataset=holdout,
    )


def _params(spec: StageSpec) -> dict[str, Any]:
    """Returns the few parameters by which checkpoints are told apart. The stage's run has all."""
    settings = spec.settings
    params: dict[str, Any] = {
        "stage": spec.name,
        "tasks": ", ".join(task.name for task in settings.tasks),
        "teacher": settings.teacher.name,
        "seed": settings.seed,
        "epochs": spec.training.epochs,
    }
    if spec.kind == "stage1":
        params["rate_weight"] = settings.stage1.rate_weight
    if spec.kind == "stage2":
        rates = settings.stage2.rate_weights
        params["rate_weight"] = ", ".join(map(repr, rates)) or settings.stage2.rate_weight
        params["conditioning"] = settings.model.conditioning.kind
        params["prior"] = settings.model.prior
        params["latent_channels"] = settings.model.encoder.latent_channels
    return params


def _log_evaluation(
    spec: StageSpec,
    specs: Mapping[str, StageSpec],
    store: Store,
    tracker: Tracker,
    run_id: str,
    pipeline_id: str,
    val: Dataset,
) -> None:
    """Logs the arms below `run_id`; the report, its data and the main figures to the pipeline."""
    from pipelines.tracking.pages.annotate import describe_run
    from pipelines.tracking.pages.arms import log_arms, log_figures
    from pipelines.tracking.store.client import transferring

    evaluation = store.read_json(f"{spec.folder}/evaluation.json")
    own = {arm.name: specs[arm.stage].key for arm in spec.arms if arm.stage == arm.name}
    log_arms(tracker, run_id, spec.key, evaluation, own_models=own, dataset=val)
    with tempfile.TemporaryDirectory(prefix="mantis-report-") as scratch:
        store.download_folder(f"{spec.folder}/report", Path(scratch) / "report")
        (Path(scratch) / "evaluation.json").write_bytes(
            store.read_bytes(f"{spec.folder}/evaluation.json")
        )
        with transferring():
            tracker.client.log_artifacts(pipeline_id, scratch)
    log_figures(tracker, pipeline_id, evaluation["arms"][0]["metrics"])
    describe_run(tracker, pipeline_id, evaluation, val)
