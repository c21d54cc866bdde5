"""Runs the stages of an experiment in order: skips finished ones, resumes interrupted ones.

plan.py decides which stages there are. stages/record.py keeps their results.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.chain.plan import Plan
from pipelines.chain.preflight import Preflight
from pipelines.chain.reasons import made_with
from pipelines.chain.result import ChainResult, hardware_tags, note_adopted, note_all
from pipelines.chain.tracked import track_stage
from pipelines.cluster.connect import connect
from pipelines.cluster.nodes import check_nodes, wait_for_nodes
from pipelines.cluster.preflight import check_machine, cluster_address, unused_gpu
from pipelines.settings.sections import ClusterConfig, Settings
from pipelines.stages.record import (
    claim,
    mark_done,
    mark_started,
    read_result,
    recall_run,
    remember_plan,
    remember_run,
    stage_state,
)
from pipelines.stages.spec import (
    StageContext,
    StageFailed,
    StageOutcome,
    StageSpec,
    TrainingStopped,
    with_upstream,
)
from pipelines.storage import Store, figures_wait
from pipelines.terminal.console import Console
from pipelines.training.causes import first_cause, is_interrupt

if TYPE_CHECKING:
    from pipelines.tracking.runs import Tracker

logger = logging.getLogger(__name__)
WITHOUT_WORKERS = ("prepare", "register")
"""Stages that need no training worker and no GPU."""


def run_chain(
    plan: Plan, *, console: Console, config_name: str, until: str | None = None
) -> ChainResult:
    """Runs the unfinished stages: all of them, or `until` (main arm) and those it builds on.

    After any error the same call resumes the first unfinished stage. Raises PreflightError or what
    `Preflight.check` raises before any work, StageFailed, StageBusy, or KeyboardInterrupt (also for
    SIGTERM).
    """
    store = Store(plan.settings.storage.root)
    specs = plan.specs if until is None else with_upstream(plan.specs, until)
    uri = plan.settings.tracking.uri
    remember_plan(store, plan.key, config_name, plan.specs)
    states = {spec.name: stage_state(store, spec, uri) for spec in specs}
    console.plan([spec.name for spec in specs])
    note_adopted(specs, store, console)
    if all(state == "done" for state in states.values()):
        outcomes = {spec.name: _skip(spec, store, console) for spec in specs}
        tracking = plan.settings.tracking
        run_id = recall_run(store, plan.key, tracking)
        if tracking.enabled and (run_id is None or figures_wait(store.root)):
            run_id = _catch_up(plan, specs, make_tracker(plan.settings, console), config_name)
        return _chain_result(plan, store, specs, outcomes, run_id)
    check_machine(plan.settings)
    preflight = Preflight(plan, specs)
    note_all([*preflight.check(), *unused_gpu(plan.settings)], console)
    tracker = make_tracker(plan.settings, console)
    tracker.check_access()
    try:
        shown = plan.settings.model_dump(mode="json")
        run_id = tracker.open_pipeline(config_name, shown, plan.key)
        remember_run(store, plan.key, run_id, plan.settings.tracking)
        waiting = [spec.kind for spec in specs if states[spec.name] != "done"]
        needs_ray = waiting != ["register"]
        with (
            ray_session(plan.settings, console, workers_at_start(plan.settings.cluster, waiting))
            if needs_ray
            else contextlib.nullcontext(),
            watched_machine(plan.settings, tracker, run_id),
        ):
            outcomes = run_stages(
                plan,
                specs,
                store=store,
                tracker=tracker,
                console=console,
                config_name=config_name,
                run_id=run_id,
                preflight=preflight,
                ready=lambda: nodes_for_training(plan.settings, console),
            )
        if tracker.was_away:
            run_id = _catch_up(plan, specs, tracker, config_name)
        else:
            tracker.finish(run_id, "FINISHED")
    except (KeyboardInterrupt, SystemExit) as stop:
        # On Ctrl-C Ray Train raises SystemExit(0): an interrupt must not look like success.
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
    preflight: Preflight | None = None,
    ready: Callable[[], None] = lambda: None,
) -> dict[str, StageOutcome]:
    """Runs the unfinished stages among `specs`, in order, below the MLflow run `run_id`.

    Ray must be connected. Once the data is prepared here, `preflight` checks what needs its rows.
    `ready` is called before each stage that trains or measures.
    Raises StageFailed, or what that check raises. Raises StageBusy if another process works on a
    stage.
    """
    context = StageContext(
        settings=plan.settings,
        store=store,
        tracker=tracker,
        console=console,
        specs=plan.by_name,
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
        else:
            with claim(store, spec):
                state = stage_state(store, spec, uri)  # another process may have finished it
                if state == "done":
                    _open_stage_run(spec, context.specs, tracker, run_id, finished=True)
                    outcomes[spec.name] = _skip(spec, store, console)
                else:
                    if spec.kind not in WITHOUT_WORKERS:
                        ready()
                    outcomes[spec.name] = _run_stage(
                        spec, context, resumed=state == "started" and spec.stage.trains
                    )
        track_stage(spec, specs=context.specs, store=store, tracker=tracker, run_id=run_id)
        if spec.kind == "prepare" and preflight is not None and not preflight.saw_rows:
            note_all(preflight.check(remarked=outcomes[spec.name].status == "ran"), console)
    return outcomes


def make_tracker(settings: Settings, console: Console) -> Tracker:
    """Returns the tracker of these settings. It notes on `console` if MLflow is unreachable."""
    from pipelines.tracking.runs import Tracker, locate_tracking

    tracking = settings.tracking
    # Without tracking no store is opened. A remote root could not hold the default one.
    uri = tracking.uri if tracking.enabled else "sqlite://"
    location = locate_tracking(uri, settings.storage.root)
    return Tracker(
        location,
        tracking.experiment,
        model=tracking.model,
        enabled=tracking.enabled,
        note=console.note,
    )


@contextlib.contextmanager
def ray_session(settings: Settings, console: Console, workers: int | None = None) -> Iterator[None]:
    """Joins or starts Ray, and shows the progress that its workers report.

    `workers` training workers must fit, by default the fewest of a training.
    """
    from pipelines.terminal.progress import watch_progress

    root = settings.storage.root
    with (
        connect(settings.cluster, root, workers=workers, note=console.note),
        watch_progress(console),
    ):
        yield


def workers_at_start(cluster: ClusterConfig, waiting: Sequence[str]) -> int:
    """Returns the training workers to have before the stages of these kinds run.

    An autoscaling cluster prepares the data with a single one: it proves that such nodes can be
    had and used, and the others would be paid for while they wait.
    """
    if all(kind in WITHOUT_WORKERS for kind in waiting):
        return 0
    return 1 if cluster.autoscaling and "prepare" in waiting else cluster.min_workers


def nodes_for_training(settings: Settings, console: Console) -> None:
    """Waits for the nodes of a training in an autoscaling cluster, and checks them."""
    cluster, root = settings.cluster, settings.storage.root
    if cluster.autoscaling and cluster_address(cluster) != "local":
        wait_for_nodes(cluster, root, cluster.min_workers, console.note)
        check_nodes(cluster, root)


@contextlib.contextmanager
def watched_machine(settings: Settings, tracker: Tracker, run_id: str | None) -> Iterator[None]:
    """Logs the use of this machine to the run `run_id`, unless `tracking` turns it off."""
    if not (settings.tracking.enabled and settings.tracking.system_metrics):
        yield
        return
    from pipelines.tracking.pages.system_metrics import system_metrics

    with system_metrics(tracker, run_id):
        yield


def _run_stage(spec: StageSpec, context: StageContext, *, resumed: bool) -> StageOutcome:
    console, store = context.console, context.store
    uri = context.settings.tracking.uri
    console.stage_started(spec.name, resumed=resumed)
    began = time.monotonic()
    stage_run_id = _open_stage_run(
        spec, context.specs, context.tracker, context.run_id, finished=False
    )
    interrupt = signal.getsignal(signal.SIGINT)
    mark_started(store, spec, made_with(spec))
    try:
        result = spec.stage.run(spec, replace(context, stage_run_id=stage_run_id))
        result = mark_done(store, spec, result, uri)
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        cause = first_cause(error)
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
    tags = hardware_tags(result)
    context.tracker.finish(stage_run_id, "FINISHED", metrics=metrics, tags=tags)
    status, seconds = "resumed" if resumed else "ran", time.monotonic() - began
    console.stage_finished(spec.name, status, seconds, result.get("summary", ""))
    return StageOutcome(spec.key, status, round(seconds, 3), result.get("rows", {}))


def _skip(spec: StageSpec, store: Store, console: Console) -> StageOutcome:
    status = "adopted" if spec.adopted_for else "skipped"
    console.stage_finished(spec.name, status, 0.0)
    return StageOutcome(spec.key, status, 0.0, read_result(store, spec).get("rows", {}))


def _catch_up(
    plan: Plan, specs: Sequence[StageSpec], tracker: Tracker, config_name: str
) -> str | None:
    """Logs finished stages that MLflow has missed.

    Returns the run id of the pipeline, or None if MLflow is unreachable.
    """
    store = Store(plan.settings.storage.root)
    shown = plan.settings.model_dump(mode="json")
    tracker.ask_again()
    run_id = tracker.open_pipeline(config_name, shown, plan.key)
    for spec in specs if run_id is not None else ():
        stage_run_id = _open_stage_run(spec, plan.by_name, tracker, run_id, finished=True)
        result = read_result(store, spec)
        figures, tags = result.get("metrics", {}), hardware_tags(result)
        tracker.finish(stage_run_id, "FINISHED", metrics=figures, tags=tags)
        track_stage(spec, specs=plan.by_name, store=store, tracker=tracker, run_id=run_id)
    tracker.finish(run_id, "FINISHED")
    remember_run(store, plan.key, run_id, plan.settings.tracking)
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
        adopted=bool(spec.adopted_for),
    )


def _chain_result(
    plan: Plan,
    store: Store,
    specs: tuple[StageSpec, ...],
    outcomes: dict[str, StageOutcome],
    run_id: str | None,
) -> ChainResult:
    """Returns the result. Its metrics are those of the last main-arm stage that has any."""
    metrics: dict[str, float] = {}
    model = None
    for spec in specs:
        result = read_result(store, spec)
        if not spec.arm:
            metrics = result.get("metrics") or metrics
            model = result.get("model") or model
    return ChainResult(run_id, plan.settings.storage.root, outcomes, metrics, model)
