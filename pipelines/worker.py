"""What runs in every Ray Train worker of a training stage. The driver's side is trainer.py.

The science of a step is mantis_core's; this file brings it batches, stores its checkpoints and
reports its figures.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.reader import local_batches, train_batches
from data_prep.schema import Manifest, read_manifest
from data_prep.subgroups import resolve_tasks
from mantis_core.build import (
    Problem,
    codec_teacher_recipe,
    individual_recipe,
    ready_teacher,
    stage1_recipe,
    stage2_recipe,
    teacher_recipe,
)
from mantis_core.checkpoint import (
    load_folder,
    save_folder,
    save_model,
    save_training_state,
)
from mantis_core.model import Mantis
from mantis_core.per_task import PerTaskCodecs, save_codecs
from mantis_core.recipes import Recipe, Stage1Student
from mantis_core.tasks import Batch
from mantis_core.teacher import Teacher
from mantis_core.training import Session, TrainingError, fit, steps_per_epoch
from pipelines.problem import problem_of
from pipelines.run_checkpoints import Checkpoint, newest_intact, read_checkpoint
from pipelines.settings import Settings
from pipelines.storage import Store, local_copy, writing
from pipelines.trainer import (
    BEST,
    CHECKPOINT,
    HISTORY,
    ROWS,
    ROWS_LEFT_OUT,
    ROWS_SHA256,
    training_config,
)

if TYPE_CHECKING:
    from torch import Tensor

DATA_CPUS = 0.25
"""What one reading task claims of a CPU beside the training workers."""


def worker_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: the same loop as anywhere, with Ray Data batches."""
    import torch
    from ray import train as ray_train

    run = ray_train.get_context()
    rank, world = run.get_world_rank(), run.get_world_size()
    settings = Settings.model_validate(config["settings"])
    _set_threads(settings, run.get_local_world_size())
    manifest = read_manifest(config["manifest_folder"])
    section = training_config(settings, config["kind"])
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu(settings) else "cpu"
    recipe = build_recipe(config["kind"], settings, manifest, config["upstream"])
    session = Session(
        recipe,
        section,
        steps_per_epoch=steps_per_epoch(manifest.split("train").rows, section.batch_size),
        seed=settings.seed,
        device=device,
        rank=rank,
    )
    history: list[dict[str, Any]] = []
    checkpoint = agreed_checkpoint(config, rank)
    if checkpoint is not None:
        session.load_state(checkpoint.tensors, checkpoint.record)
        history = checkpoint.record["history"]
    if world > 1:
        from torch.nn.parallel import DistributedDataParallel

        session.distribute(lambda module: DistributedDataParallel(module, broadcast_buffers=False))

    def batches(epoch: int) -> Iterator[Batch]:
        arrays = train_batches(
            config["manifest_folder"],
            manifest,
            settings.data,
            seed=settings.seed,
            epoch=epoch,
            global_batch=section.batch_size,
            rank=rank,
            world_size=world,
            num_cpus=DATA_CPUS,
        )
        return (Batch.from_arrays(each, device) for each in arrays)

    def holdout() -> Iterator[Batch]:
        return holdout_batches(
            config["manifest_folder"], manifest, settings, section.batch_size, rank, world, device
        )

    on_step = _progress(config["name"], session) if rank == 0 else None
    for figures in fit(session, batches, holdout, on_step=on_step):
        history.append(epoch_record(session, manifest, figures))
        report_checkpoint(session, history, config, rank)
    if rank == 0:
        ship(session, settings, manifest, config, history)


def agreed_checkpoint(config: Mapping[str, Any], rank: int) -> Checkpoint | None:
    """The newest intact checkpoint of this training, the same one for all workers."""
    from ray.train.collective import broadcast_from_rank_zero

    from pipelines.progress import report_note

    store = Store(config["checkpoints"])
    if rank == 0:
        found = newest_intact(store, lambda text: report_note(f"{config['name']}: {text}"))
        broadcast_from_rank_zero(found.name if found else None)
        return found
    name = broadcast_from_rank_zero(None)
    return read_checkpoint(store, name) if name else None


def epoch_record(
    session: Session, manifest: Manifest, figures: Mapping[str, float]
) -> dict[str, Any]:
    """An epoch's finite figures, the rows it left out, and the hash of those it consumed.

    TrainingError if one was consumed twice.
    """
    wanted = session.steps_per_epoch * session.config.batch_size
    if figures["train/rows"] != wanted:
        raise TrainingError(
            f"an epoch of {wanted} rows had {figures['train/rows']} different ones: its figures "
            "are not kept; run it again, and report this if it happens again"
        )
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    left_out = manifest.split("train").rows - figures["train/rows"]
    return {**finite, ROWS_LEFT_OUT: left_out, ROWS_SHA256: session.rows_sha256}


def build_recipe(
    kind: str, settings: Settings, manifest: Manifest, upstream: Mapping[str, str]
) -> Recipe:
    """The recipe of a training kind, from the finished stages' folders in `upstream`."""
    problem = problem_of(manifest, settings.data)
    if kind == "teacher":
        return teacher_recipe(settings.teacher, problem, seed=settings.seed)
    teacher = load_teacher(settings, problem, upstream.get("teacher"))
    if kind == "codec_teacher":
        return codec_teacher_recipe(settings.codec_teacher, teacher)
    if kind == "individual":
        return individual_recipe(teacher, problem, seed=settings.seed)
    if kind == "stage1":
        return stage1_recipe(settings.stage1, settings.model, teacher, problem, seed=settings.seed)
    stage1 = stage_tensors(upstream["stage1"])
    return stage2_recipe(
        settings.stage2, settings.model, teacher, problem, stage1, seed=settings.seed
    )


def load_teacher(settings: Settings, problem: Problem, folder: str | None) -> Teacher:
    """The frozen teacher of these settings; `folder` is that of its own stage, if it has one."""
    trained = None if folder is None else stage_tensors(folder)
    return ready_teacher(settings.teacher, problem, trained)


def stage_tensors(folder: str) -> dict[str, Tensor]:
    """The weights a finished training stage left in its folder (a path or URI)."""
    with local_copy(f"{folder}/{CHECKPOINT}") as local:
        return load_folder(local)[0]


def holdout_batches(
    folder: str,
    manifest: Manifest,
    settings: Settings,
    batch_size: int,
    rank: int,
    world: int,
    device: Any,
) -> Iterator[Batch]:
    """This worker's share of the held-back rows; every worker gets a batch, no row two workers."""
    rows = manifest.split("holdout").rows
    size = max(1, min(batch_size, math.ceil(rows / world)))
    arrays = local_batches(folder, manifest, settings.data, split="holdout", global_batch=size)
    for each in itertools.islice(arrays, rank, None, world):
        yield Batch.from_arrays(each, device)


def report_checkpoint(
    session: Session, history: Sequence[Mapping[str, Any]], config: Mapping[str, Any], rank: int
) -> None:
    """The epoch's figures and, from rank 0, a resumable checkpoint to Ray Train.

    Every report carries all epochs so far: one whose report was lost with its driver is logged with
    the next.
    """
    from ray import train as ray_train

    from pipelines.progress import report_epoch

    metrics = {**history[-1], HISTORY: json.dumps(list(history))}
    if rank != 0:
        ray_train.report(metrics)
        return
    folder = tempfile.mkdtemp(prefix="mantis-epoch-")
    try:
        tensors, record = session.state()
        record = {**record, "key": config["key"], "history": list(history)}
        save_training_state(folder, tensors, record)
        with writing(config["checkpoints"]):
            ray_train.report(metrics, checkpoint=ray_train.Checkpoint.from_directory(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told = {name: value for name, value in history[-1].items() if not name.startswith(ROWS)}
    report_epoch(config["name"], {"epochs": session.config.epochs, **told})


def ship(
    session: Session,
    settings: Settings,
    manifest: Manifest,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the best student as the stage's model folder, and the epochs' figures."""
    student = session.best_student()
    meta = {
        "stage": config["name"],
        "key": config["key"],
        "metrics": session.best,
        "preparation": preparation(settings, manifest),
    }
    with tempfile.TemporaryDirectory(prefix="mantis-ship-") as folder:
        if isinstance(student, Mantis):
            student.finish()
            save_model(folder, student, meta)
        elif isinstance(student, PerTaskCodecs):
            student.finish()
            save_codecs(folder, student, meta)
        else:
            stage1 = isinstance(student, Stage1Student)
            tensors = student.shipped() if stage1 else student.state_dict()
            save_folder(folder, tensors, {"kind": config["kind"]}, meta)
        store = Store(config["folder"])
        store.upload_folder(folder, CHECKPOINT)
        store.write_json(f"{HISTORY}.json", list(history))
        store.write_json(BEST, session.best)


def preparation(settings: Settings, manifest: Manifest) -> dict[str, Any]:
    """How images became rows, without paths: what scoring a model on other images repeats."""
    table = resolve_tasks(settings.tasks, settings.data)
    data = settings.data.model_dump(mode="json", exclude={"root"})
    data["sources"] = [
        {**source, "path": "."} if "path" in source else source for source in data["sources"]
    ]
    return {
        "seed": manifest.seed,
        "data": data,
        "batch_size": settings.evaluate.batch_size,
        "masks": list(table.masks),
        "ignored": [list(values) for values in table.ignored],
        "data_fingerprint": manifest.fingerprint,
    }


def _progress(name: str, session: Session) -> Callable[[int, int, dict[str, float]], None]:
    from pipelines.progress import report_step

    def on_step(done: int, steps: int, figures: dict[str, float]) -> None:
        place = {"epoch": session.step_index // session.steps_per_epoch + (done < steps)}
        counts = {"epochs": session.config.epochs, "step": done, "steps": steps}
        report_step(name, {**place, **counts, **figures})

    return on_step


def _set_threads(settings: Settings, local_workers: int) -> None:
    import torch

    wanted = settings.cluster.threads_per_worker
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(wanted or max(1, cores // max(1, local_workers)))


def _on_gpu(settings: Settings) -> bool:
    return settings.cluster.gpus_per_worker > 0
