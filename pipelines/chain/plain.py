"""Runs a plan in plain processes, without Ray and MLflow.

It is for machines without them, such as a laptop or a rented GPU. Keys and folders are those of the
chain on Ray, so each of the two skips the stages that the other has finished. An interrupted
training starts again from its first step. Trainings and measurements of arms run in several
processes, which may share a GPU. No model is registered.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from pipelines.chain.earlier import recipes_before
from pipelines.chain.plan import Plan
from pipelines.chain.preflight import Preflight
from pipelines.chain.processes import pool_of
from pipelines.chain.reasons import differences, made_with
from pipelines.chain.result import ChainResult, note_adopted, note_all
from pipelines.cluster.machine import threads_each
from pipelines.evaluation.arms import Arm, ArmSource, by_model
from pipelines.evaluation.split_pass import (
    Evaluated,
    arm_figures,
    evaluate_locally,
)
from pipelines.settings.sections import Settings
from pipelines.stages import prepare
from pipelines.stages.evaluate import (
    arm_sources,
    joined_answers,
    kept_answers,
    write_evaluation,
)
from pipelines.stages.measured import keep_measured, measured_file
from pipelines.stages.record import (
    claim,
    mark_done,
    mark_started,
    read_result,
    remember_plan,
    stage_state,
)
from pipelines.stages.spec import StageFailed, StageOutcome, StageSpec, with_upstream
from pipelines.stages.train import result_of, training_of
from pipelines.storage import Store
from pipelines.terminal.console import Console
from pipelines.training.files import HISTORY
from pipelines.training.job import Training

if TYPE_CHECKING:
    from mantis_core.training.loop import Session

Say = Callable[[str], None]


def plain_chain(
    plan: Plan, *, shards: str | None, jobs: int, console: Console, config_name: str
) -> ChainResult:
    """Runs a plan up to its evaluation.

    `shards` is a prepared folder; with None the data is prepared first. After a failure the same
    call continues with the first unfinished stage. Raises what `run_plain` and `Preflight.check`
    raise.
    """
    store, uri = Store(plan.settings.storage.root), plan.settings.tracking.uri
    specs = [spec for spec in plan.specs if spec.kind != "register"]
    before = {spec.name: stage_state(store, spec, uri) for spec in specs}
    note_adopted(specs, store, console)
    if shards is not None:
        check_prepared(plan, read_manifest(shards), shards)
    preflight = Preflight(plan, specs)
    note_all(preflight.check(shards), console)
    prepared = shards or prepare_plain(plan, jobs=jobs, say=console.note)
    if shards is None and before["prepare"] != "done":
        note_all(preflight.check(remarked=True), console)
    run_plain([plan], prepared=prepared, jobs=jobs, say=console.note, config_name=config_name)
    outcomes = {}
    for spec in specs:
        if spec.kind != "prepare" or shards is None:
            status = "ran" if before[spec.name] != "done" else "skipped"
            rows = read_result(store, spec).get("rows", {})
            outcomes[spec.name] = StageOutcome(spec.key, status, 0.0, rows)
    metrics = read_result(store, plan.by_name["evaluate"])["metrics"]
    return ChainResult(None, plan.settings.storage.root, outcomes, metrics, None)


def run_plain(
    plans: Sequence[Plan],
    *,
    prepared: str,
    jobs: int,
    say: Say,
    skip: Callable[[int, Arm], bool] = lambda number, arm: False,
    on_measured: Callable[[int, Arm, Evaluated], None] | None = None,
    any_seed: bool = False,
    config_name: str = "",
) -> None:
    """Trains and measures the arms of all plans in order, `jobs` stages or arms at once.

    `prepared` is a folder of shards. Raises DataError if it is not the plans' own, see
    `check_prepared`, which takes `any_seed`.
    `on_measured` receives each arm with the number of its plan as soon as it is measured. Arms for
    which `skip` is true are left out; their plan then gets no stage `evaluate`. Arms of a finished
    `evaluate` are measured again only if `on_measured` is given. If a stage fails, stages and arms
    that build on it are left out. Its error is raised after all others have finished.
    """
    manifest = read_manifest(prepared)
    for plan in plans:
        check_prepared(plan, manifest, prepared, any_seed=any_seed)
        remember_plan(Store(plan.settings.storage.root), plan.key, config_name, plan.specs)
    measured: list[dict[str, Evaluated]] = [{} for _ in plans]
    keeps = on_measured is None and not any_seed  # another seed's folder is not the plan's data
    if keeps:
        measured = [_kept(plan, manifest) for plan in plans]
    todo: list[tuple[int, Sequence[Arm]]] = []
    for number, plan in enumerate(plans):
        if on_measured is not None or not _is_evaluated(plan):
            own = [a for a in plan.arms if not skip(number, a) and a.name not in measured[number]]
            own.sort(key=lambda arm: arm.rate_weight or math.inf)  # a rate's arms side by side
            todo += [(number, arms) for arms in by_model(own)]
    work = _Work(plans, prepared, jobs, say, any_seed)
    with pool_of(jobs) as pool:

        def measure(number: int, arms: Sequence[Arm]) -> Future[Any]:
            plan, threads = plans[number], threads_each(jobs)
            sources = arm_sources(arms, plan.by_name)
            return pool.submit(_measure, prepared, manifest, plan.settings, sources, threads)

        for (number, arms), found in work.in_order(todo, pool, measure):
            for arm in arms:
                measured[number][arm.name] = found
                figures = arm_figures(found, arm.name)["metrics"]
                shown = ("val/top1", "val/miou", "val/wire_bytes")
                figures = {n: round(v, 4) for n, v in figures.items() if n in shown}
                say(f"{arm.name}: {figures}")
                if keeps:
                    _keep(plans[number], arm, found)
                if on_measured is not None:
                    on_measured(number, arm, found)
    for plan, parts in zip(plans, measured, strict=True):
        if parts and len(parts) == len(plan.arms) and not _is_evaluated(plan):
            say(_evaluate(plan, prepared, parts))


def train_plain(
    plans: Sequence[Plan], *, prepared: str, jobs: int, say: Say
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """Trains the main arm of all plans, `jobs` stages at once.

    Yields the number of a plan and the figures of every epoch of its stage 2 as soon as it has
    finished. Failures and folders of other plans are handled as in `run_plain`; a folder that
    nothing is trained on is not read.
    """
    todo = [(number, plan.arms[:1]) for number, plan in enumerate(plans)]
    work = _Work(plans, prepared, jobs, say)
    with pool_of(jobs) as pool:

        def history(number: int, arms: Sequence[Arm]) -> Future[Any]:
            plan = plans[number]
            store, found = Store(plan.settings.storage.root), Future[Any]()
            found.set_result(
                store.read_json(f"{plan.by_name[arms[0].stage].folder}/{HISTORY}.json")
            )
            return found

        for (number, _), figures in work.in_order(todo, pool, history):
            yield number, figures


def prepare_plain(plan: Plan, *, jobs: int, say: Say) -> str:
    """Prepares the plan's data in `jobs` processes unless it is done. Returns the folder."""
    from data_prep.prepare.shards import prepare as make_shards

    spec, store = plan.specs[0], Store(plan.settings.storage.root)
    if _is_done(spec, plan.settings):
        return spec.folder
    began = time.monotonic()
    with claim(store, spec), pool_of(jobs) as pool:
        mark_started(store, spec, made_with(spec))
        manifest = make_shards(
            spec.settings.data,
            plan.table,
            seed=spec.settings.seed,
            output=spec.folder,
            splits=("train", "val"),
            run=lambda tables, function, job: pool.map(_Call(function, job), tables),
        )
        result = mark_done(store, spec, prepare.result_of(manifest), plan.settings.tracking.uri)
    for remark in manifest.remarks:
        say(f"prepare: {remark}")
    say(f"prepare: {time.monotonic() - began:.0f} s, {result['summary']}")
    return spec.folder


def check_prepared(
    plan: Plan, manifest: Manifest, prepared: str, *, any_seed: bool = False
) -> None:
    """Raises DataError if a folder does not hold the images and tasks that the plan would prepare.

    Stages have the keys of the plan, so their images must be the plan's too. Tasks, classes, image
    size, sources and seed are compared; the seed draws the holdout and the order. A folder that
    `mantis prepare` wrote has recorded its config, and then all that decides its images is
    compared. With `any_seed` the folder may be that of another seed: plans of several seeds then
    have the same images in the same order, and one holdout.
    """
    spec, table, store = plan.specs[0], plan.table, Store(prepared)
    sources = spec.settings.data.sources
    pairs = {
        "tasks": (manifest.tasks, table.tasks),
        "classes": (manifest.classes, table.classes),
        "data.image_size": (manifest.image_size, spec.settings.data.size),
        "data.sources": (
            [(source.name, source.kind) for source in manifest.sources],
            [(source.source_name, source.kind) for source in sources],
        ),
        "seed": (manifest.seed, spec.settings.seed),
    }
    differing = [name for name, (found, wanted) in pairs.items() if found != wanted]
    if not differing and store.exists("STARTED"):
        begun = store.read_json("STARTED")
        if begun["recipe"] not in (spec.recipe, recipes_before([spec])[spec.name]):
            differing = differences(begun["config"], json.loads(json.dumps(spec.config)))
    if any_seed:
        differing = [name for name in differing if name != "seed"]
    if differing:
        named = {name: pairs[name] for name in ("data.image_size", "seed")}
        words = [
            f"{name} is {named[name][0]} there and {named[name][1]} here"
            if name in named
            else f"{name} differs"
            for name in differing
        ]
        raise DataError(
            f"{prepared} was prepared by another config: {', '.join(words)}. "
            "Give the folder that `mantis prepare` made with this config and these overrides."
        )


@dataclass(frozen=True)
class _Call:
    """A function of a table with its job, picklable for a process pool."""

    function: Callable[..., Any]
    job: Any

    def __call__(self, table: Any) -> Any:
        return self.function(table, job=self.job)


@dataclass
class _Work:
    """Trains the stages that plans still need, each after those it builds on."""

    plans: Sequence[Plan]
    prepared: str
    jobs: int
    say: Say
    any_seed: bool = False
    waiting: dict[str, tuple[StageSpec, Plan]] = field(default_factory=dict)  # by folder

    def in_order(
        self,
        todo: Sequence[tuple[int, Sequence[Arm]]],
        pool: ProcessPoolExecutor,
        finish: Callable[[int, Sequence[Arm]], Future[Any]],
    ) -> Iterator[tuple[tuple[int, Sequence[Arm]], Any]]:
        """Yields arms of one stage with the result of `finish`, which starts when it is trained.

        At most `jobs` trainings and measurements run at once.
        """
        for number, arms in todo:
            for spec in with_upstream(self.plans[number].specs, arms[0].stage):
                if spec.stage.trains and not _is_done(spec, self.plans[number].settings):
                    self.waiting.setdefault(spec.folder, (spec, self.plans[number]))
        untrained = {id(plan): plan for _, plan in self.waiting.values()}
        for plan in untrained.values():
            manifest = read_manifest(self.prepared)
            check_prepared(plan, manifest, self.prepared, any_seed=self.any_seed)
        left = list(todo)
        running: dict[Future[Any], str | tuple[int, Sequence[Arm]]] = {}
        lost: set[str] = set()  # folders of failed stages
        errors: list[BaseException] = []
        while left or running:
            for item in list(left):
                if len(running) >= self.jobs:
                    break
                number, arms = item
                plan = self.plans[number]
                upstream = with_upstream(plan.specs, arms[0].stage)
                needed = [spec for spec in upstream if spec.folder in self.waiting]
                if lost & {spec.folder for spec in needed}:
                    left.remove(item)
                elif not needed:
                    left.remove(item)
                    running[finish(number, arms)] = item
                elif needed[0].folder not in running.values():  # upstream stages come first
                    store = Store(plan.settings.storage.root)
                    own = training_of(needed[0], plan.by_name, self.prepared, plan.table, store)
                    task = (needed[0], own, threads_each(self.jobs))
                    running[pool.submit(train_stage, *task)] = needed[0].folder
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                what = running.pop(future)
                error = future.exception()
                if error is not None:
                    errors.append(error)
                if isinstance(what, str):
                    if error is None:
                        del self.waiting[what]
                        self.say(future.result())
                    else:
                        lost.add(what)
                elif error is None:
                    yield what, future.result()
        if errors:
            raise errors[0]


def train_stage(spec: StageSpec, training: Training, threads: int) -> str:
    """Trains one stage in this process. Returns a line for the console. Raises StageFailed."""
    from pipelines.training.worker import train_plainly

    settings, began = spec.settings, time.monotonic()
    store = Store(settings.storage.root)

    def on_epoch(session: Session, history: Sequence[Mapping[str, Any]]) -> None:
        epoch = f"epoch {history[-1]['epoch']:.0f} of {training.section.epochs}"
        line = f"{spec.name} seed {settings.seed}, {epoch}: {_shown(history[-1])}"
        print(line, file=sys.stderr, flush=True)

    with claim(store, spec):
        mark_started(store, spec, made_with(spec))
        try:
            train_plainly(training, threads=threads, on_epoch=on_epoch)
        except Exception as error:
            raise StageFailed(spec.name, error) from error
        result = mark_done(store, spec, result_of(spec, store), settings.tracking.uri)
    seconds = f"{time.monotonic() - began:.0f} s"
    return f"{spec.name} seed {settings.seed}: {seconds}, {_shown(result['metrics'])}"


def _shown(figures: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in figures.items() if k.endswith(("/top1", "/bits", "/loss"))}


def _evaluate(plan: Plan, prepared: str, parts: dict[str, Evaluated]) -> str:
    """Writes the files of a plan's stage `evaluate` from its measured arms. Returns a line."""
    spec, store = plan.by_name["evaluate"], Store(plan.settings.storage.root)
    with claim(store, spec):
        mark_started(store, spec, made_with(spec))
        done = joined_answers(plan.arms, parts)
        result = write_evaluation(spec, plan.by_name, store, prepared, done)
        mark_done(store, spec, result, plan.settings.tracking.uri)
    return f"evaluate seed {plan.settings.seed}: {result['summary']}"


def _measure(
    prepared: str,
    manifest: Manifest,
    settings: Settings,
    sources: Sequence[ArmSource],
    threads: int,
) -> Evaluated:
    reading = settings.data.reading
    return evaluate_locally(
        prepared, manifest, reading, sources, settings=settings, threads=threads
    )


def _kept(plan: Plan, manifest: Manifest) -> dict[str, Evaluated]:
    """Returns the arms that an earlier, unfinished or smaller evaluation has measured."""
    if _is_evaluated(plan):
        return {}
    store = Store(plan.settings.storage.root)
    return kept_answers(plan.by_name["evaluate"], plan.by_name, store, manifest)


def _keep(plan: Plan, arm: Arm, found: Evaluated) -> None:
    path = measured_file(plan.by_name["evaluate"], arm, plan.by_name)
    keep_measured(Store(plan.settings.storage.root), path, found, arm.name)


def _is_done(spec: StageSpec, settings: Settings) -> bool:
    return stage_state(Store(settings.storage.root), spec, settings.tracking.uri) == "done"


def _is_evaluated(plan: Plan) -> bool:
    return _is_done(plan.by_name["evaluate"], plan.settings)
