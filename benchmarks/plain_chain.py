"""The stage chain without Ray and MLflow, for machines that have neither: a GPU lent for an hour.

    python -m benchmarks.plain_chain SHARDS --config configs/camvid.yaml --jobs 2 [key=value ...]

trains and measures what `mantis evaluate` would; SHARDS is the folder `mantis prepare` wrote.

Same plan, same keys, same folders as `mantis evaluate`: a stage finished by one is skipped by the
other, and one that was interrupted is trained anew. Stages and the measuring of arms are spread
over processes, which may share a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import torch

from benchmarks.program import count, one_message, say
from data_prep.reader import local_batches
from data_prep.schema import Manifest, read_manifest
from mantis_core.tasks import Batch
from mantis_core.training import Session, fit, steps_per_epoch
from pipelines.evaluation import arm_sources, write_evaluation
from pipelines.plan import TRAINING_KINDS, Arm, StageSpec, plan_arms, with_upstream
from pipelines.run_record import claim, mark_done, mark_started, stage_state
from pipelines.settings import Settings, load_settings
from pipelines.split_pass import ArmSource, Evaluated, arm_figures, evaluate_locally
from pipelines.stages import Plan, add_report, make_plan
from pipelines.storage import Store
from pipelines.trainer import HISTORY, rows_of, training_config
from pipelines.worker import build_recipe, epoch_record, ship

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One process's share: `jobs` of them run at once. `prepared` is the folder of the shards."""

    spec: StageSpec
    upstream: dict[str, str]
    prepared: str
    jobs: int


def run_plain(
    plans: Sequence[Plan],
    *,
    prepared: str,
    jobs: int,
    say: Say,
    skip: Callable[[int, Arm], bool] = lambda number, arm: False,
    on_measured: Callable[[int, Arm, Evaluated], None] | None = None,
) -> None:
    """Trains and measures the arms of all plans, `jobs` stages or arms at once, in their order.

    `prepared` is a folder written by `mantis prepare`; its images and tasks must be the plans' own
    (ValueError otherwise). Each arm is given to `on_measured`, with its plan's number, as soon as
    it is measured. Arms that `skip` names are left out, and with them their plan's stage
    `evaluate`; those of a finished `evaluate` are measured again only for `on_measured`. A stage
    that fails takes with it what builds on it, and its error is raised when all others are through.
    """
    manifest = read_manifest(prepared)
    for plan in plans:
        wanted = [(task.name, task.labels) for task in plan.table.tasks]
        if wanted != [(task.name, task.labels) for task in manifest.tasks]:
            raise ValueError(f"{prepared} was prepared for other tasks than this config's")
    todo: list[tuple[int, Arm]] = []
    for number, plan in enumerate(plans):
        if on_measured is not None or not _is_evaluated(plan):
            arms = [arm for arm in plan_arms(plan.settings) if not skip(number, arm)]
            arms.sort(key=lambda arm: arm.rate_weight or math.inf)  # a rate's arms side by side
            todo += [(number, arm) for arm in arms]
    measured: list[dict[str, Evaluated]] = [{} for _ in plans]
    with _pool(jobs) as pool:

        def measure(number: int, arm: Arm) -> Future[Any]:
            plan = plans[number]
            by_name = {spec.name: spec for spec in plan.specs}
            sources = {each.name: each for each in arm_sources(plan.settings, by_name)}
            own = (prepared, manifest, plan.settings, sources[arm.name], jobs)
            return pool.submit(_measure, *own)

        for (number, arm), found in _in_order(plans, todo, pool, prepared, jobs, say, measure):
            measured[number][arm.name] = found
            figures = arm_figures(found, arm.name)["metrics"]
            figures = {
                n: round(v, 4) for n, v in figures.items() if n in ("val/top1", "val/wire_bytes")
            }
            say(f"{arm.name}: {figures}")
            if on_measured is not None:
                on_measured(number, arm, found)
    for plan, parts in zip(plans, measured, strict=True):
        whole = bool(parts) and len(parts) == len(list(plan_arms(plan.settings)))
        if whole and not _is_evaluated(plan):
            say(_evaluate(plan, prepared, parts))


def train_plain(
    plans: Sequence[Plan], *, prepared: str, jobs: int, say: Say
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """Trains the main arm of all plans, `jobs` stages at once; gives each plan's number and the
    figures of its stage 2, epoch by epoch, as soon as they are there. Failures as in `run_plain`.
    """
    todo = [(number, next(iter(plan_arms(plan.settings)))) for number, plan in enumerate(plans)]
    with _pool(jobs) as pool:

        def history(number: int, arm: Arm) -> Future[Any]:
            plan = plans[number]
            spec = next(spec for spec in plan.specs if spec.name == arm.stage)
            store, found = Store(plan.settings.storage.root), Future[Any]()
            found.set_result(store.read_json(f"{spec.folder}/{HISTORY}.json"))
            return found

        for (number, _), figures in _in_order(plans, todo, pool, prepared, jobs, say, history):
            yield number, figures


def adopt(plan: Plan) -> Plan:
    """The plan with finished trainings of the same recipe in the place of its own missing ones.

    They were made by other code or packages: whoever asks for them knows that their weights would
    be the same, or does not mind. A stage keeps its name and gets the folder and key it found.
    """
    store, uri = Store(plan.settings.storage.root), plan.settings.tracking.uri
    specs = []
    for spec in plan.specs:
        if spec.kind in TRAINING_KINDS and stage_state(store, spec, uri) != "done":
            above, _, name = spec.folder.rpartition("/")
            own = re.compile(re.escape(name[: -len(spec.key[:12])]) + r"[0-9a-f]{12}")
            for sibling in filter(own.fullmatch, store.list(above)):
                folder = f"{above}/{sibling}"
                begun = store.read_json(f"{folder}/STARTED")
                other = replace(spec, folder=folder, key=begun["key"])
                same = begun.get("recipe") == spec.recipe
                if same and stage_state(store, other, uri) == "done":
                    spec = other
                    break
        specs.append(spec)
    return replace(plan, specs=tuple(specs))


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that end when this one does, whatever ended it."""
    context = get_context("spawn")  # CUDA does not survive a fork
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends this process at once when its parent is gone: nobody is left to take what it makes.

    Ctrl-C reaches both; only the parent says so.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _in_order(
    plans: Sequence[Plan],
    todo: Sequence[tuple[int, Arm]],
    pool: ProcessPoolExecutor,
    prepared: str,
    jobs: int,
    say: Say,
    finish: Callable[[int, Arm], Future[Any]],
) -> Iterator[tuple[tuple[int, Arm], Any]]:
    """What `finish` gives for each arm once its stages are trained; never more than `jobs` things
    at once."""
    work: dict[str, tuple[StageSpec, Plan]] = {}
    for number, arm in todo:
        for spec in with_upstream(plans[number].specs, arm.stage):
            if spec.kind in TRAINING_KINDS and not _is_done(spec, plans[number].settings):
                work.setdefault(spec.folder, (spec, plans[number]))
    waiting = list(todo)
    running: dict[Future[Any], str | tuple[int, Arm]] = {}
    lost: set[str] = set()  # folders of stages that failed, or that build on one
    errors: list[BaseException] = []
    while waiting or running:
        for item in list(waiting):
            if len(running) >= jobs:
                break
            number, arm = item
            plan = plans[number]
            needed = [s for s in with_upstream(plan.specs, arm.stage) if s.folder in work]
            if lost & {spec.folder for spec in needed}:
                waiting.remove(item)
            elif not needed:
                waiting.remove(item)
                running[finish(number, arm)] = item
            else:
                first = needed[0]  # upstream stages stand before those that build on them
                if first.folder not in running.values():
                    own = Work(first, upstream_folders(first, plan), prepared, jobs)
                    running[pool.submit(train_stage, own)] = first.folder
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            what = running.pop(future)
            error = future.exception()
            if error is not None:
                errors.append(error)
            if isinstance(what, str):
                if error is None:
                    del work[what]
                    say(future.result())
                else:
                    lost.add(what)
            elif error is None:
                yield what, future.result()
    if errors:
        raise errors[0]


def train_stage(work: Work) -> str:
    """Trains one stage in this process; returns a line for people."""
    spec, settings, began = work.spec, work.spec.settings, time.monotonic()
    store = Store(settings.storage.root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = _threads(work.jobs)
    torch.set_num_threads(threads)
    manifest = read_manifest(work.prepared)
    section = training_config(settings, spec.kind)

    with claim(store, spec):
        mark_started(store, spec)
        session = Session(
            build_recipe(spec.kind, settings, manifest, work.upstream),
            section,
            steps_per_epoch=steps_per_epoch(manifest.split("train").rows, section.batch_size),
            seed=settings.seed,
            device=device,
        )

        def batches(epoch: int | None, split: str = "train") -> Iterator[Batch]:
            arrays = local_batches(
                work.prepared,
                manifest,
                settings.data,
                global_batch=section.batch_size,
                split=split,
                seed=settings.seed,
                epoch=epoch,
                threads=threads,
            )
            return (Batch.from_arrays(each, device) for each in arrays)

        history = []
        for figures in fit(session, batches, lambda: batches(None, "holdout")):
            history.append(epoch_record(session, manifest, figures))
            epoch = f"epoch {figures['epoch']:.0f} of {section.epochs}"
            line = f"{spec.name} seed {settings.seed}, {epoch}: {_shown(figures)}"
            print(line, file=sys.stderr, flush=True)
        config = {"name": spec.name, "kind": spec.kind, "key": spec.key, "folder": spec.folder}
        ship(session, settings, manifest, config, history)
        result = {"metrics": session.best, "rows": rows_of(history)}
        mark_done(store, spec, result, settings.tracking.uri)
    seconds = f"{time.monotonic() - began:.0f} s"
    return f"{spec.name} seed {settings.seed}: {seconds}, {_shown(session.best)}"


def _shown(figures: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in figures.items() if k.endswith(("/top1", "/bits", "/loss"))}


def _evaluate(plan: Plan, prepared: str, parts: dict[str, Evaluated]) -> str:
    """Writes the files of a plan's stage `evaluate` from its measured arms."""
    specs = {each.name: each for each in plan.specs}
    spec, store = specs["evaluate"], Store(plan.settings.storage.root)
    with claim(store, spec):
        mark_started(store, spec)
        answers = {name: found.answers[name] for name, found in parts.items()}
        first = next(iter(parts.values()))
        done = Evaluated(answers, first.tasks, first.single_class, first.image_size)
        result = write_evaluation(spec, plan.settings, specs, store, prepared, done)
        add_report(spec.folder, store)
        mark_done(store, spec, result, plan.settings.tracking.uri)
    return f"evaluate seed {plan.settings.seed}: {result['summary']}"


def _measure(
    prepared: str, manifest: Manifest, settings: Settings, source: ArmSource, jobs: int
) -> Evaluated:
    return evaluate_locally(
        prepared, manifest, settings.data, [source], settings=settings, threads=_threads(jobs)
    )


def upstream_folders(spec: StageSpec, plan: Plan) -> dict[str, str]:
    """Folders of the stages it builds on, by kind, as the workers take them."""
    by_name = {each.name: each for each in plan.specs}
    return {by_name[name].kind: by_name[name].folder for name in spec.upstream}


def _is_done(spec: StageSpec, settings: Settings) -> bool:
    return stage_state(Store(settings.storage.root), spec, settings.tracking.uri) == "done"


def _is_evaluated(plan: Plan) -> bool:
    spec = next(spec for spec in plan.specs if spec.kind == "evaluate")
    return _is_done(spec, plan.settings)


def _threads(jobs: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // jobs)


@one_message
def main() -> int:
    """One config's chain up to its stage `evaluate`, line by line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--config", required=True)
    parser.add_argument("--jobs", type=count, default=1, help="stages or arms at once")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    plan = make_plan(load_settings(arguments.config, arguments.overrides))

    run_plain([plan], prepared=arguments.shards, jobs=arguments.jobs, say=say)
    evaluate = next(spec for spec in plan.specs if spec.kind == "evaluate")
    print(json.dumps({"evaluation": f"{evaluate.folder}/evaluation.json"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
