"""The stage chain without Ray and MLflow, for machines that have neither: a GPU lent for an hour.

Same plan, same keys, same folders as `mantis evaluate`: a stage finished by one is skipped by the
other, and one that was interrupted is trained anew. Stages of one kind, and the arms of an
evaluation, are spread over processes, which may share a GPU: one of these small networks does not
fill it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from data_prep.reader import local_batches
from data_prep.schema import Manifest, read_manifest
from mantis_core.tasks import Batch
from mantis_core.training import Session, fit, steps_per_epoch
from pipelines.evaluation import arm_sources, write_evaluation
from pipelines.plan import TRAINING_KINDS, StageSpec, with_upstream
from pipelines.run_record import claim, mark_done, mark_started, stage_state
from pipelines.settings import Settings
from pipelines.split_pass import ArmSource, Evaluated, evaluate_locally
from pipelines.stages import Plan
from pipelines.storage import Store
from pipelines.trainer import training_config
from pipelines.worker import build_recipe, ship

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One process's share: `jobs` of them run at once. `prepared` is the folder of the shards."""

    spec: StageSpec
    upstream: dict[str, str]
    prepared: str
    jobs: int


def run_plain(plans: Sequence[Plan], *, prepared: str, jobs: int, say: Say) -> None:
    """Runs the stages of all plans up to their evaluations, those of one kind side by side.

    `prepared` is a folder written by `mantis prepare`; its images and tasks must be the plans' own
    (ValueError otherwise). The error of a stage is raised when the others of its kind are through.
    """
    manifest = read_manifest(prepared)
    for plan in plans:
        wanted = [(task.name, task.labels) for task in plan.table.tasks]
        if wanted != [(task.name, task.labels) for task in manifest.tasks]:
            raise ValueError(f"{prepared} was prepared for other tasks than this config's")
    specs: dict[str, tuple[StageSpec, Plan]] = {}
    for plan in plans:
        for spec in with_upstream(plan.specs, "evaluate"):
            specs.setdefault(spec.folder, (spec, plan))
    context = get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for kind in TRAINING_KINDS:
            waiting = [
                Work(spec, _upstream(spec, plan), prepared, jobs)
                for spec, plan in specs.values()
                if spec.kind == kind and not _is_done(spec, plan.settings)
            ]
            futures = [pool.submit(_train_stage, work) for work in waiting]
            for line in _finished(futures):
                say(line)
        for spec, plan in specs.values():
            if spec.kind == "evaluate" and not _is_done(spec, plan.settings):
                say(_evaluate(spec, plan, prepared, manifest, pool, jobs))


def _train_stage(work: Work) -> str:
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

        history = list(fit(session, batches, lambda: batches(None, "holdout")))
        config = {"name": spec.name, "kind": spec.kind, "key": spec.key, "folder": spec.folder}
        ship(session, settings, manifest, config, history)
        mark_done(store, spec, {"metrics": session.best}, settings.tracking.uri)
    shown = {k: round(v, 4) for k, v in session.best.items() if k.endswith(("/top1", "/bits"))}
    return f"{spec.name} seed {settings.seed}: {time.monotonic() - began:.0f} s, {shown}"


def _evaluate(
    spec: StageSpec,
    plan: Plan,
    prepared: str,
    manifest: Manifest,
    pool: ProcessPoolExecutor,
    jobs: int,
) -> str:
    """Measures every arm of a plan, an arm a process; writes the stage's files."""
    began = time.monotonic()
    store, settings = Store(plan.settings.storage.root), plan.settings
    specs = {each.name: each for each in plan.specs}
    with claim(store, spec):
        mark_started(store, spec)
        sources = arm_sources(settings, specs)
        futures = [
            pool.submit(_measure, prepared, manifest, settings, source, jobs) for source in sources
        ]
        parts = [future.result() for future in futures]
        answers = {name: own for part in parts for name, own in part.answers.items()}
        first = parts[0]
        done = Evaluated(answers, first.tasks, first.single_class, first.image_size)
        result = write_evaluation(spec, settings, specs, store, prepared, done)
        mark_done(store, spec, result, settings.tracking.uri)
    return f"evaluate seed {settings.seed}: {time.monotonic() - began:.0f} s, {result['summary']}"


def _measure(
    prepared: str, manifest: Manifest, settings: Settings, source: ArmSource, jobs: int
) -> Evaluated:
    return evaluate_locally(
        prepared, manifest, settings.data, [source], settings=settings, threads=_threads(jobs)
    )


def _upstream(spec: StageSpec, plan: Plan) -> dict[str, str]:
    """Folders of the stages it builds on, by kind, as the workers take them."""
    by_name = {each.name: each for each in plan.specs}
    return {by_name[name].kind: by_name[name].folder for name in spec.upstream}


def _is_done(spec: StageSpec, settings: Settings) -> bool:
    return stage_state(Store(settings.storage.root), spec, settings.tracking.uri) == "done"


def _finished(futures: Sequence[Future[str]]) -> Iterable[str]:
    errors = []
    for future in as_completed(futures):
        error = future.exception()
        if error is None:
            yield future.result()
        else:
            errors.append(error)
    if errors:
        raise errors[0]


def _threads(jobs: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // jobs)
