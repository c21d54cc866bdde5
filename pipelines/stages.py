"""Runs the stages of an experiment in order: skips the finished, resumes the interrupted.

What there is to run stands in plan.py; what a finished stage leaves behind in run_record.py.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster import check_machine, connect
from pipelines.console import Console
from pipelines.plan import StageKind, StageSpec, plan_key, plan_stages, with_upstream
from pipelines.run_record import (
    claim,
    mark_done,
    mark_started,
    read_result,
    recall_run,
    remember_run,
    stage_state,
)
from pipelines.schedule import check_batches
from pipelines.settings import Settings
from pipelines.storage import Store

if TYPE_CHECKING:
    from data_prep.schema import TaskTable
    from pipelines.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageContext:
    """What a runner gets beside its spec. `manifest_folder` is where `prepare` put the shards;
    `run_id` and `stage_run_id` are MLflow's, None while it is off or away."""

    settings: Settings
    store: Store
    tracker: Tracker
    console: Console
    specs: Mapping[str, StageSpec]
    manifest_folder: str
    table: TaskTable
    config_name: str
    run_id: str | None = None
    stage_run_id: str | None = None


@dataclass(frozen=True)
class StageOutcome:
    """`status` is ran, skipped or resumed. `rows` is what its result says of them: by split where
    it prepared them; consumed in an epoch, left out and hashed where it trained on them."""

    key: str
    status: str
    seconds: float
    rows: dict[str, Any]


@dataclass(frozen=True)
class ChainResult:
    """What `mantis run --json` prints. `metrics` are the main arm's."""

    run_id: str | None
    root: str
    stages: dict[str, StageOutcome]
    metrics: dict[str, float]
    model: str | None


@dataclass(frozen=True)
class Plan:
    """The stages of a config with what was read from the data to make them."""

    settings: Settings
    table: TaskTable
    specs: tuple[StageSpec, ...]

    @property
    def key(self) -> str:
        return plan_key(self.specs)


class TrainingStopped(RuntimeError):
    """A training was ended on purpose before its last epoch; run again, it goes on from there."""


class StageFailed(RuntimeError):
    """A stage ended with an error: `cause` is the first one, out of Ray's wrappings."""

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(f"{stage} failed: {type(cause).__name__}: {cause}")
        self.stage = stage
        self.cause = cause


def make_plan(settings: Settings) -> Plan:
    """Looks at the data, cheaply, and plans. Raises DataError or SettingsError."""
    from data_prep.sources import source_fingerprint
    from data_prep.subgroups import resolve_tasks

    table = resolve_tasks(settings.tasks, settings.data)
    fingerprint = source_fingerprint(settings.data, table)
    return Plan(settings, table, plan_stages(settings, table, fingerprint))


def run_chain(
    plan: Plan, *, console: Console, config_name: str, until: StageKind | None = None
) -> ChainResult:
    """Runs what is not done yet, all stages or those that `until` (main arm) needs and itself.

    Raises StageFailed, StageBusy, PreflightError before any work, or KeyboardInterrupt (also for
    SIGTERM); the same call again goes on where this one stopped.
    """
    store = Store(plan.settings.storage.root)
    specs = plan.specs if until is None else with_upstream(plan.specs, until)
    uri = plan.settings.tracking.uri
    states = {spec.name: stage_state(store, spec, uri) for spec in specs}
    console.plan([spec.name for spec in specs])
    if all(state == "done" for state in states.values()):
        outcomes = {spec.name: _skip(spec, store, console) for spec in specs}
        run_id = recall_run(store, plan.key)
        if plan.settings.tracking.enabled and (run_id is None or store.list("spool")):
            run_id = _catch_up(plan, specs, make_tracker(plan.settings, console), config_name)
        return _chain_result(plan, store, specs, outcomes, run_id)
    check_machine(plan.settings)
    check_batches(specs)
    tracker = make_tracker(plan.settings, console)
    try:
        shown = plan.settings.model_dump(mode="json")
        run_id = tracker.open_pipeline(config_name, shown, plan.key)
        remember_run(store, plan.key, run_id)
        waiting = [spec.kind for spec in specs if states[spec.name] != "done"]
        needs_ray = waiting != ["register"]
        with _ray_session(plan.settings, console) if needs_ray else contextlib.nullcontext():
            outcomes = run_stages(
                plan,
                specs,
                store=store,
                tracker=tracker,
                console=console,
                config_name=config_name,
                run_id=run_id,
            )
        if tracker.was_away:
            run_id = _catch_up(plan, specs, tracker, config_name)
        else:
            tracker.finish(run_id, "FINISHED")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ray Train leaves by SystemExit(0) on Ctrl-C: an interrupt must not look like success.
        tracker.close("KILLED")
        raise KeyboardInterrupt from stop
    except BaseException:
        tracker.close("FAILED")
        raise
    return _chain_result(plan, store, specs, outcomes, run_id)


def run_stages(
    plan: Plan,
    specs: Sequence[StageSpec],
    *,
    store: Store,
    tracker: Tracker,
    console: Console,
    config_name: str,
    run_id: str | None,
) -> dict[str, StageOutcome]:
    """Runs those of `specs`, stages of `plan` in order, that are not done, below an MLflow run.

    Ray must be connected. Raises StageFailed, or StageBusy where another process works on one.
    """
    context = StageContext(
        settings=plan.settings,
        store=store,
        tracker=tracker,
        console=console,
        specs={spec.name: spec for spec in plan.specs},
        manifest_folder=plan.specs[0].folder,
        table=plan.table,
        config_name=config_name,
        run_id=run_id,
    )
    uri = plan.settings.tracking.uri
    outcomes = {}
    for spec in specs:
        if stage_state(store, spec, uri) == "done":
            _open_stage_run(spec, context.specs, tracker, run_id, finished=True)
            outcomes[spec.name] = _skip(spec, store, console)
            continue
        with claim(store, spec):
            state = stage_state(store, spec, uri)  # another process may just have finished it
            if state == "done":
                _open_stage_run(spec, context.specs, tracker, run_id, finished=True)
                outcomes[spec.name] = _skip(spec, store, console)
            else:
                outcomes[spec.name] = _run_stage(spec, context, resumed=state == "started")
    return outcomes


def _run_stage(spec: StageSpec, context: StageContext, *, resumed: bool) -> StageOutcome:
    console, store = context.console, context.store
    uri = context.settings.tracking.uri
    console.stage_started(spec.name, resumed=resumed)
    began = time.monotonic()
    stage_run_id = _open_stage_run(
        spec, context.specs, context.tracker, context.run_id, finished=False
    )
    interrupt = signal.getsignal(signal.SIGINT)
    mark_started(store, spec)
    try:
        result = RUNNERS[spec.kind](spec, replace(context, stage_run_id=stage_run_id))
        result = mark_done(store, spec, result, uri)
    except Exception as error:
        cause = _first_cause(error)
        stopped = isinstance(cause, TrainingStopped)
        if not stopped:
            logger.exception("stage %s failed", spec.name)
        status = "stopped" if stopped else "failed"
        console.stage_finished(spec.name, status, time.monotonic() - began)
        context.tracker.finish(stage_run_id, "KILLED" if stopped else "FAILED")
        if stopped:
            raise cause from error
        raise StageFailed(spec.name, cause) from error
    finally:
        with contextlib.suppress(ValueError):  # Ray Train keeps its Ctrl-C handler after a fit
            signal.signal(signal.SIGINT, interrupt)
    metrics = result.get("metrics", {})
    context.tracker.finish(stage_run_id, "FINISHED", metrics=metrics)
    status, seconds = "resumed" if resumed else "ran", time.monotonic() - began
    console.stage_finished(spec.name, status, seconds, result.get("summary", ""))
    return StageOutcome(spec.key, status, round(seconds, 3), result.get("rows", {}))


def _skip(spec: StageSpec, store: Store, console: Console) -> StageOutcome:
    console.stage_finished(spec.name, "skipped", 0.0)
    return StageOutcome(spec.key, "skipped", 0.0, read_result(store, spec).get("rows", {}))


def _catch_up(
    plan: Plan, specs: Sequence[StageSpec], tracker: Tracker, config_name: str
) -> str | None:
    """Tells MLflow what it missed of finished stages; the pipeline's run id, None if it is away."""
    store = Store(plan.settings.storage.root)
    by_name = {spec.name: spec for spec in plan.specs}
    shown = plan.settings.model_dump(mode="json")
    run_id = tracker.open_pipeline(config_name, shown, plan.key)
    for spec in specs if run_id is not None else ():
        stage_run_id = _open_stage_run(spec, by_name, tracker, run_id, finished=True)
        figures = read_result(store, spec).get("metrics", {})
        tracker.finish(stage_run_id, "FINISHED", metrics=figures)
    tracker.finish(run_id, "FINISHED")
    remember_run(store, plan.key, run_id)
    return run_id


def _open_stage_run(
    spec: StageSpec,
    specs: Mapping[str, StageSpec],
    tracker: Tracker,
    run_id: str | None,
    *,
    finished: bool,
) -> str | None:
    return tracker.open_stage(
        run_id,
        spec.name,
        spec.key,
        spec.config,
        folder=spec.folder,
        upstream_keys=[specs[name].key for name in spec.upstream],
        finished=finished,
    )


@contextlib.contextmanager
def _ray_session(settings: Settings, console: Console) -> Iterator[None]:
    from pipelines.progress import watch_progress

    with connect(settings.cluster, settings.storage.root), watch_progress(console):
        yield


def make_tracker(settings: Settings, console: Console) -> Tracker:
    """The tracker of these settings; it says on `console` when MLflow is away."""
    from pipelines.tracking import Tracker, locate_tracking

    tracking = settings.tracking
    # Switched off, MLflow needs no place; a remote root has none to offer by itself.
    uri = tracking.uri if tracking.enabled else "sqlite://"
    location = locate_tracking(uri, settings.storage.root)
    return Tracker(location, tracking.experiment, enabled=tracking.enabled, note=console.note)


def _chain_result(
    plan: Plan,
    store: Store,
    specs: tuple[StageSpec, ...],
    outcomes: dict[str, StageOutcome],
    run_id: str | None,
) -> ChainResult:
    """Metrics are those of the last main-arm stage that has some; later ones know more."""
    metrics: dict[str, float] = {}
    model = None
    for spec in specs:
        result = read_result(store, spec)
        if not spec.arm:
            metrics = result.get("metrics") or metrics
            model = result.get("model") or model
    return ChainResult(run_id, plan.settings.storage.root, outcomes, metrics, model)


def _first_cause(error: BaseException) -> BaseException:
    """The error of the task or worker inside what Ray raises on the driver."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None)
    inner = inner or getattr(error, "controller_failure", None)
    return _first_cause(inner) if isinstance(inner, BaseException) else error


def _run_prepare(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    from data_prep.shards import prepare

    def progress(step: str, done: int, total: int) -> None:
        context.console.progress(spec.name, {"phase": step, "done": done, "total": total})

    settings = context.settings
    manifest = prepare(
        settings.data,
        context.table,
        seed=settings.seed,
        output=spec.folder,
        splits=("train", "val"),
        progress=progress,
    )
    rows = {name: split.rows for name, split in manifest.splits.items()}
    summary = ", ".join(f"{count} {name}" for name, count in rows.items())
    return {
        "fingerprint": manifest.fingerprint,
        "rows": rows,
        "rejected": manifest.rejected,
        "summary": f"{summary}, {manifest.rejected} rejected",
    }


def _run_training(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    from pipelines.trainer import train

    return train(spec, context)


def _run_evaluate(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    from pipelines.evaluation import run

    result: dict[str, Any] = run(spec, context)
    add_report(spec.folder, context.store)
    return result


def add_report(folder: str, store: Store) -> None:
    """Writes the report beside an evaluation.json."""
    from pipelines.report import write_report

    with tempfile.TemporaryDirectory() as made:
        write_report(store.read_json(f"{folder}/evaluation.json"), Path(made))
        store.upload_folder(made, f"{folder}/report")


def _run_register(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    from pipelines.registry import register_stage

    result: dict[str, Any] = register_stage(spec, context)
    return result


Runner = Callable[[StageSpec, StageContext], dict[str, Any]]

RUNNERS: dict[StageKind, Runner] = {
    "prepare": _run_prepare,
    "teacher": _run_training,
    "stage1": _run_training,
    "stage2": _run_training,
    "individual": _run_training,
    "codec_teacher": _run_training,
    "evaluate": _run_evaluate,
    "register": _run_register,
}
