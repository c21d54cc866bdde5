"""Runs a whole search: shared stages, trials, front, report and registration.

mantis tune --config configs/quickstart.yaml --space joint --trials 8
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.chain.plan import Plan, read_data
from pipelines.chain.preflight import Preflight, check_rows
from pipelines.chain.result import note_all
from pipelines.chain.run import make_tracker, run_stages, watched_machine
from pipelines.cluster.connect import connect
from pipelines.cluster.preflight import check_machine, cluster_address
from pipelines.search.driver import SearchDriver
from pipelines.search.journal import Journal, TrialRecord, finished_points, open_journal
from pipelines.search.points import (
    Halving,
    RdPoint,
    SearchObjective,
    hypervolume,
    pareto_front,
    spread,
)
from pipelines.search.result import FrontPoint, SearchOptions, SearchResult
from pipelines.search.space import describe, first_stage, searched_space
from pipelines.search.trial import SearchTask, search_settings
from pipelines.settings.errors import SettingsError
from pipelines.settings.sections import Settings
from pipelines.stages.record import remember_plan, stage_state
from pipelines.stages.schedule import check_batches
from pipelines.stages.spec import with_upstream
from pipelines.storage import Store, scratch
from pipelines.terminal.console import Console

if TYPE_CHECKING:
    from pipelines.search.runs import SearchRuns
    from tune_spaces.domains import Space

logger = logging.getLogger(__name__)
REGISTERED = 5  # most trials of the front that one search registers


def run_search(
    settings: Settings, options: SearchOptions, *, stream: TextIO, config_name: str
) -> SearchResult:
    """Runs a search. With `options.resume` the same call continues one that ended early.

    Raises PreflightError, StageBusy or what `Preflight.check` raises before any work, StageFailed
    if a shared stage fails, and KeyboardInterrupt.
    """
    began = time.monotonic()
    task = search_task(settings, config_name)
    space = searched_space(settings, options.space, include_stage1=options.include_stage1)
    base = task.plan({})
    key = search_key(base, space, options)
    store = Store(settings.storage.root)
    folder = f"searches/{options.space}-{key[:12]}"
    _check_first(store, folder, settings, options, space)
    preflight = Preflight(base, with_upstream(base.specs, "stage2"))
    notes = preflight.check()
    with open_journal(store, folder) as journal, Console(stream) as console:
        note_all(notes, console)
        store.write_json(f"{folder}/about.json", _about(task, space, options, key))
        runs = _open_runs(task.settings, console, key, config_name, options, space)
        status = "FAILED"
        try:
            session = _Session(
                task=task,
                space=space,
                base=base,
                journal=journal,
                runs=runs,
                options=options,
                key=key,
                stream=stream,
                console=console,
                preflight=preflight,
            )
            result = session.run()
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit) as stop:
            status = "KILLED"
            raise KeyboardInterrupt from stop
        finally:
            runs.close(status)
            runs.tracker.close("KILLED")
    return replace(result, seconds=round(time.monotonic() - began, 1))


def search_key(base: Plan, space: Space, options: SearchOptions) -> str:
    """Hashes what decides the trials of a search. Their number is left out, so it can be raised."""
    what = {
        "stages": {spec.name: spec.key for spec in with_upstream(base.specs, "stage2")},
        "space": describe(space),
        "tune": base.settings.tune.model_dump(mode="json", exclude={"max_failures", "concurrent"}),
        "options": [options.kind, options.objective, options.seed],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class _Session:
    """The state of one call of `run_search`."""

    def __init__(
        self,
        *,
        task: SearchTask,
        space: Space,
        base: Plan,
        journal: Journal,
        runs: SearchRuns,
        options: SearchOptions,
        key: str,
        stream: TextIO,
        console: Console,
        preflight: Preflight,
    ) -> None:
        self.task, self.space, self.base, self.journal = task, space, base, journal
        self.runs, self.options, self.key, self.stream = runs, options, key, stream
        self.console, self.preflight = console, preflight
        self.store = journal.store
        self.concurrent: int | None = None
        self.wall = self.idle = 0.0
        self.models: dict[int, str] = {}
        levels = bool(task.settings.stage2.rate_weights)
        self.objective = SearchObjective(options.objective, reference_point(base), levels)

    def run(self) -> SearchResult:
        """Does the remaining work. Ray is started only if a trial or an evaluation is left."""
        self.runs.repair(self.journal.trials)
        trials = self.journal.trials.values()
        left = len(trials) < self.options.trials or any(r.state == "running" for r in trials)
        chosen = self._chosen() if not left and self.options.register else []
        if left or any(not self._is_evaluated(record) for record in chosen):
            settings = self.task.settings
            with (
                connect(settings.cluster, settings.storage.root, note=self.console.note),
                watched_machine(settings, self.runs.tracker, self.runs.run_id),
            ):
                if left:
                    self._share()
                    self._search()
                if self.options.register:
                    self._evaluate()
        if self.options.register:
            self._register()
        result = self._result()
        self._report(result)
        return result

    def _share(self) -> None:
        """Runs the stages that all trials share, so that no trial waits for another."""
        last = "stage1" if first_stage(self.space) == "stage2" else "prepare"
        teacher = any(spec.kind == "teacher" for spec in self.base.specs)
        if last == "prepare" and teacher:
            last = "teacher"
        self._run(self.base, last, self.runs.run_id)

    def _search(self) -> None:
        from data_prep.manifest import read_manifest
        from pipelines.search.tune import check_fits, nodes_for_trials, run_trials
        from pipelines.search.view import SearchView

        settings, tune = self.task.settings, self.task.settings.tune
        nodes, self.concurrent = nodes_for_trials(settings, self.console.note)
        manifest = read_manifest(self.base.specs[0].folder)

        def check(plan: Plan) -> None:
            check_fits(nodes, plan.settings)
            check_batches(plan.specs)
            check_rows(plan.specs, manifest)

        epochs = settings.stage2.epochs
        halving = Halving(epochs, tune.first_epochs, tune.reduction_factor)
        with SearchView(self.stream) as view:
            driver = SearchDriver(
                self.options,
                self.space,
                self.task,
                self.journal,
                self.runs,
                view,
                objective=self.objective,
                check=check,
            )
            view.start(
                self.journal.trials,
                total=self.options.trials,
                concurrent=self.concurrent,
                epochs=epochs,
            )
            began = time.time()
            self.wall = run_trials(
                driver, halving if tune.stop_early else None, concurrent=self.concurrent
            )
            self.idle = driver.timing.idle(began, began + self.wall)

    def _chosen(self) -> list[TrialRecord]:
        """Returns the trials to register. The most accurate is last and keeps `candidate`."""
        points = finished_points(self.journal.trials)
        chosen = spread(points, REGISTERED, self.objective.reference)
        last = {number: place for place, (number, _) in enumerate(chosen)}
        return [self.journal.trials[number] for number in sorted(last, key=last.__getitem__)]

    def _is_evaluated(self, record: TrialRecord) -> bool:
        plan = self.task.plan(record.params)
        spec = next(spec for spec in plan.specs if spec.kind == "evaluate")
        return stage_state(self.store, spec, plan.settings.tracking.uri) == "done"

    def _evaluate(self) -> None:
        """Measures the chosen trials with real streams on the evaluation split.

        The search itself never uses this split.
        """
        for record in self._chosen():
            plan = self.task.plan(record.params)
            name = f"{self.task.config_name}, {self.journal.folder}, trial {record.number}"
            remember_plan(self.store, plan.key, name, with_upstream(plan.specs, "evaluate"))
            self._run(plan, "evaluate", self._run_of(record))

    def _register(self) -> None:
        from pipelines.tracking import registry

        tracker = self.runs.tracker
        for record in self._chosen():
            run_id = self._run_of(record)
            if run_id is None:
                self.console.note(
                    "MLflow does not answer: no model was registered. Run the same command later."
                )
                return
            made = registry.register(tracker, run_id)
            model = made["model"].removeprefix("models:/").rpartition("/")[0]
            self.models[record.number] = made["model"]
            tags = {
                "mantis.search": self.key,
                "mantis.trial": record.number,
                "mantis.overrides": json.dumps(dict(record.params)),
            }
            for name, value in tags.items():
                tracker.client.set_model_version_tag(model, made["version"], name, str(value))
            self.runs.close_trial(record)
            self.console.note(f"trial {record.number}: {made['model']}")

    def _run(self, plan: Plan, until: str, run_id: str | None) -> None:
        """Runs the stages of a plan in the driver and shows their progress."""
        from pipelines.terminal.progress import watch_progress

        specs = with_upstream(plan.specs, until)
        with Console(self.stream) as console, watch_progress(console):
            console.plan([spec.name for spec in specs])
            run_stages(
                plan,
                specs,
                store=self.store,
                tracker=self.runs.tracker,
                console=console,
                config_name=self.task.config_name,
                run_id=run_id,
                preflight=self.preflight if plan is self.base else None,
            )

    def _run_of(self, record: TrialRecord) -> str | None:
        return self.runs.open_trial(record.number, record.params, record.weight)

    def _result(self) -> SearchResult:
        trials = self.journal.trials
        points = finished_points(trials)
        stage1 = {r.keys["stage1"] for r in trials.values() if r.epochs and "stage1" in r.keys}
        states = ("finished", "stopped", "failed", "equal")
        counts = {s: sum(r.state == s for r in trials.values()) for s in states}
        return SearchResult(
            run_id=self.runs.run_id,
            root=self.task.settings.storage.root,
            folder=self.store.join(self.journal.folder),
            trials=counts,
            front=tuple(
                FrontPoint(
                    key[0],
                    round(points[key].wire_bytes, 3),
                    round(points[key].top1, 5),
                    dict(trials[key[0]].params),
                    trials[key[0]].run_id,
                    self.models.get(key[0]),
                    points[key].level,
                )
                for key in pareto_front(points)
            ),
            hypervolume=round(hypervolume(list(points.values()), self.objective.reference), 6),
            stage1_configs=len(stage1),
            epochs=sum(len(record.epochs) for record in trials.values()),
            failed={r.number: r.reason for r in trials.values() if r.state == "failed"},
            concurrent=self.concurrent,
            seconds=0.0,
            overhead=round(self.idle / self.wall, 4) if self.wall else None,
        )

    def _report(self, result: SearchResult) -> None:
        """Writes the report to the search's folder and to MLflow."""
        from pipelines.search.report import write_search_report

        halving_epoch = min(self.task.settings.tune.first_epochs, self.task.settings.stage2.epochs)
        with scratch(self.store.root, "mantis-search") as folder:
            write_search_report(
                folder,
                result,
                self.journal.trials,
                self.space,
                reference=self.objective.reference,
                epoch=halving_epoch,
                title=f"{self.task.config_name}, space {self.options.space}",
            )
            self.store.upload_folder(folder, self.journal.folder)
            self.runs.keep_files(folder)


def reference_point(base: Plan) -> RdPoint:
    """Returns the reference of hypervolumes: the bytes of raw 8-bit pixels, at a top1 of 0.

    It does not depend on the trials. So the hypervolume of a search never falls, and searches on
    the same data can be compared.
    """
    height, width = base.settings.data.size
    return RdPoint(3.0 * height * width, 0.0)


def search_task(settings: Settings, config_name: str) -> SearchTask:
    """Reads the data's tasks and fingerprint once for all trials.

    The address of the cluster is stored as well, because trials run on other nodes.
    """
    settings = search_settings(settings)
    address = cluster_address(settings.cluster)
    if address != "local":
        joined = settings.cluster.model_copy(update={"address": address})
        settings = settings.model_copy(update={"cluster": joined})
    table, fingerprint = read_data(settings)
    return SearchTask(settings, table, fingerprint, config_name)


def _check_first(
    store: Store, folder: str, settings: Settings, options: SearchOptions, space: Space
) -> None:
    """Raises SettingsError or PreflightError for mistakes that can be found before any work."""
    if all(task.kind == "segmentation" for task in settings.tasks):
        raise SettingsError(
            "`tasks` has only segmentations, and a search compares trials by top1, which these do "
            "not have: add a classification task, or compare configs by `mantis run`"
        )
    known = [name for name in store.list(f"{folder}/journal") if not name.startswith(".")]
    if known and not options.resume:
        raise SettingsError(
            f"this search was begun before, in {store.join(folder)}: add --resume to continue it, "
            "or --seed N to start another one"
        )
    if options.register and not settings.tracking.enabled:
        raise SettingsError("--register needs MLflow: set tracking.enabled to true")
    check_machine(settings)


def _about(task: SearchTask, space: Space, options: SearchOptions, key: str) -> Mapping[str, Any]:
    return {
        "key": key,
        "config": task.config_name,
        "space": options.space,
        "fields": describe(space),
        "search": options.kind,
        "objective": options.objective,
        "seed": options.seed,
        "tune": task.settings.tune.model_dump(mode="json"),
    }


def _open_runs(
    settings: Settings,
    console: Console,
    key: str,
    config_name: str,
    options: SearchOptions,
    space: Space,
) -> SearchRuns:
    from pipelines.search.runs import SearchRuns

    runs = SearchRuns(make_tracker(settings, console), key, config_name)
    runs.tracker.check_access()
    shown = {"space": options.space, "search": options.kind, "objective": options.objective}
    config = settings.model_dump(mode="json", exclude={"tracking", "evaluate"})
    searched = {"seed": options.seed, **{f"field.{k}": v for k, v in describe(space).items()}}
    runs.open(f"{config_name} {options.space}", {**shown, "search_options": searched, **config})
    return runs
