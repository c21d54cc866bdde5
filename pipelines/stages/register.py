"""Stage `register`: registers the main arm as a new version of the model in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines.stages.spec import Inputs, Stage, StageContext, StageSpec

if TYPE_CHECKING:
    from pipelines.settings.sections import Settings
    from pipelines.tracking.lookup import StageRun


def planned(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields the stage once if MLflow is enabled."""
    if settings.tracking.enabled:
        yield "", settings


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Registers the main arm as the newest `candidate`.

    Reads result.json of stage `stage2` (key `model_folder`, relative to the stage's folder) and
    evaluation.json of stage `evaluate`. Returns {"model": "models:/<name>/<v>", "version": v}.
    Raises ConnectionError if MLflow is away: the run is to be resumed later.
    """
    from pipelines.tracking.registry import register_stages
    from pipelines.tracking.store.client import TrackingError

    try:
        version = register_stages(context.tracker, _stages(spec, context), context.config_name)
    except TrackingError as error:
        raise ConnectionError(str(error)) from error
    return {"model": f"models:/{context.tracker.model}/{version}", "version": version}


def _stages(spec: StageSpec, context: StageContext) -> dict[str, StageRun]:
    from pipelines.tracking.lookup import StageRun, stage_run_id

    return {
        name: StageRun(
            name,
            key=planned.key,
            run_id=stage_run_id(context.tracker, planned.key) or "",
            status="FINISHED",
            folder=planned.folder,
            upstream_keys=tuple(context.specs[upstream].key for upstream in planned.upstream),
        )
        for name, planned in context.specs.items()
        if name in spec.upstream or name == "prepare"
    }


REGISTER = Stage(
    name="register",
    planned=planned,
    after=("stage2", "evaluate"),
    reads=(),
    code=(
        "pipelines.tracking.whole_model",
        "pipelines.tracking.client_model",
        "pipelines.tracking.server_model",
    ),
    run=run,
)
