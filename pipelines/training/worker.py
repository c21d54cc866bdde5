"""Trains one stage in every Ray Train worker, or in a plain process.

`mantis_core` defines a training step. This file feeds it batches, stores its checkpoints and
reports its figures. Its drivers are `pipelines/stages/train.py` and `pipelines/chain/plain.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.manifest import Manifest, read_manifest
from data_prep.read.ahead import begun_ahead
from data_prep.read.batches import kept_rows, local_batches, train_batches
from mantis_core.folders import save_training_state
from mantis_core.tasks import Batch
from mantis_core.training.loop import Session, TrainingError, fit, steps_per_epoch
from pipelines.cluster.machine import usable_cpus
from pipelines.settings.sections import ClusterConfig
from pipelines.storage import Store, decoded_folder, private_folder, scratch, writing
from pipelines.training.checkpoints import Checkpoint, newest_intact, read_checkpoint
from pipelines.training.files import (
    BEST,
    CHECKPOINT,
    COMPUTED_ON,
    HISTORY,
    ROWS,
    ROWS_LEFT_OUT,
    ROWS_SHA256,
)
from pipelines.training.hardware import computed_on
from pipelines.training.job import Training
from pipelines.training.problem import problem_of
from pipelines.training.waiting import all_do
from pipelines.training.weights import SavedWeights

DATA_CPUS = 0.25
"""Share of a CPU that Ray reserves for one reading task."""

HELD_BYTES = 2**30
"""Most bytes of held-back images that a worker keeps between epochs, on the device that trains."""

History = list[dict[str, Any]]
"""The figures of all epochs so far."""


@dataclass(frozen=True)
class Place:
    """The device of one training worker, and its rank among `world` workers."""

    device: torch.device
    rank: int = 0
    world: int = 1


def train(
    training: Training,
    manifest: Manifest,
    place: Place,
    batches: Callable[[int], Iterator[Batch]],
    *,
    on_epoch: Callable[[Session, History], None],
    on_step: Callable[[Session, int, int, dict[str, float]], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Trains from the start or from `checkpoint`. Rank 0 writes the best student.

    `batches` returns this worker's share of an epoch. Returns the figures of all epochs.
    """
    settings, section = training.settings, training.section
    problem = problem_of(manifest, settings.data.stored_short_side)
    session = Session(
        training.recipe(settings, problem, SavedWeights(training.upstream)),
        section,
        steps_per_epoch=steps_per_epoch(manifest.split("train").rows, section.batch_size),
        seed=training.seed,
        device=place.device,
        rank=place.rank,
    )
    history: History = []
    if checkpoint is not None:
        session.load_state(checkpoint.tensors, checkpoint.record)
        history = checkpoint.record["history"]
    if place.world > 1:
        from torch.nn.parallel import DistributedDataParallel

        session.distribute(lambda module: DistributedDataParallel(module, broadcast_buffers=False))

    holdout = read_once(lambda: holdout_batches(training, manifest, place), HELD_BYTES)
    shown = None if on_step is None else partial(on_step, session)
    ahead = begun_ahead(batches, steps=session.steps_per_epoch, epochs=section.epochs)
    for figures in fit(session, ahead, holdout, on_step=shown):
        history.append(epoch_record(session, manifest, figures))
        on_epoch(session, history)
    if place.rank == 0:
        ship(session, training, history, place)
    return history


def ray_worker(config: dict[str, Any]) -> None:
    """Runs in every Ray Train worker. Trains with batches from Ray Data."""
    from ray import train as ray_train

    run = ray_train.get_context()
    training: Training = config["training"]
    settings = training.settings
    _set_threads(settings.cluster, run.get_local_world_size())
    on_gpu = settings.cluster.gpus_per_worker > 0
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    place = Place(device, run.get_world_rank(), run.get_world_size())
    manifest = read_manifest(training.prepared)

    threads = torch.get_num_threads()
    kept = keep_decoded(training, manifest, place)

    def batches(epoch: int) -> Iterator[Batch]:
        if kept:
            return kept_batches(training, manifest, place, epoch=epoch, threads=threads)
        arrays = train_batches(
            training.prepared,
            manifest,
            settings.data.reading,
            seed=training.seed,
            epoch=epoch,
            global_batch=training.section.batch_size,
            rank=place.rank,
            world_size=place.world,
            num_cpus=DATA_CPUS,
        )
        return (Batch.from_arrays(each, place.device) for each in arrays)

    train(
        training,
        manifest,
        place,
        batches,
        on_epoch=EpochReports(training, place),
        on_step=_reporter(training.name) if place.rank == 0 else None,
        checkpoint=agreed_checkpoint(training, place),
    )


def train_plainly(
    training: Training, *, threads: int, on_epoch: Callable[[Session, History], None]
) -> History:
    """Trains in this process without Ray, with `threads` threads for torch and for reading."""
    torch.set_num_threads(threads)
    place = Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_manifest(training.prepared)

    def batches(epoch: int) -> Iterator[Batch]:
        return kept_batches(training, manifest, place, epoch=epoch, threads=threads)

    return train(training, manifest, place, batches, on_epoch=on_epoch)


def agreed_checkpoint(training: Training, place: Place) -> Checkpoint | None:
    """Returns the newest intact checkpoint. All workers get the one that rank 0 has found."""
    from ray.train.collective import broadcast_from_rank_zero

    from pipelines.terminal.progress import report_note

    store = Store(training.checkpoints)
    if place.rank == 0:
        found = newest_intact(store, lambda text: report_note(f"{training.name}: {text}"))
        broadcast_from_rank_zero(found.name if found else None)
        return found
    name = broadcast_from_rank_zero(None)
    return read_checkpoint(store, name) if name else None


def epoch_record(
    session: Session, manifest: Manifest, figures: Mapping[str, float]
) -> dict[str, Any]:
    """Returns an epoch's finite figures, the rows it left out and the hash of its rows.

    Raises TrainingError if a row was used twice.
    """
    wanted = session.steps_per_epoch * session.config.batch_size
    if figures["train/rows"] != wanted:
        raise TrainingError(
            f"an epoch of {wanted} rows had {figures['train/rows']} different ones, so its figures "
            "are discarded. Run it again, and report this error if it repeats."
        )
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    left_out = manifest.split("train").rows - figures["train/rows"]
    return {**finite, ROWS_LEFT_OUT: left_out, ROWS_SHA256: session.rows_sha256}


def kept_batches(
    training: Training, manifest: Manifest, place: Place, *, epoch: int, threads: int
) -> Iterator[Batch]:
    """Yields this worker's batches of an epoch, read in this process by `threads` threads."""
    arrays = local_batches(
        training.prepared,
        manifest,
        training.settings.data.reading,
        global_batch=training.section.batch_size,
        seed=training.seed,
        epoch=epoch,
        rank=place.rank,
        world_size=place.world,
        threads=threads,
        cache=_cache(training),
    )
    return (Batch.from_arrays(each, place.device) for each in arrays)


def keep_decoded(training: Training, manifest: Manifest, place: Place) -> bool:
    """Decodes this machine's training images once, if `data.cache` says so, and says if they fit.

    Returns when every worker has done so: none waits for another's images in the middle of a step.
    """
    cache = _cache(training)
    if cache is None:
        return False
    reading, threads = training.settings.data.reading, torch.get_num_threads()

    def work() -> bool:
        own = (cache, training.prepared, manifest, reading)
        return kept_rows(*own, split="train", threads=threads) is not None

    return all_do(work, place.device, place.world)


def _cache(training: Training) -> Path | None:
    """Returns the folder of decoded images, which only this user can enter; None without one."""
    if training.settings.data.cache == "none":
        return None
    return private_folder(decoded_folder())


def holdout_batches(training: Training, manifest: Manifest, place: Place) -> Iterator[Batch]:
    """Yields this worker's rows of the holdout, if it has any. Each row is one worker's."""
    arrays = local_batches(
        training.prepared,
        manifest,
        training.settings.data.reading,
        split="holdout",
        global_batch=training.section.batch_size,
        rank=place.rank,
        world_size=place.world,
        threads=torch.get_num_threads(),
        cache=_cache(training),
    )
    return (Batch.from_arrays(each, place.device) for each in arrays)


def read_once(
    batches: Callable[[], Iterator[Batch]], most_bytes: float
) -> Callable[[], Iterator[Batch]]:
    """Returns `batches`, which are kept where they have at most `most_bytes`.

    Held-back images are the same in each epoch, and an epoch goes over them twice.
    """
    kept: list[Batch] | None = None

    def reading() -> Iterator[Batch]:
        nonlocal kept
        found: list[Batch] = []
        size = 0
        for batch in batches():
            size += batch.nbytes
            if size <= most_bytes:
                found.append(batch)
            else:
                found.clear()
            yield batch
        if size <= most_bytes:
            kept = found

    return lambda: reading() if kept is None else iter(kept)


class EpochReports:
    """Reports each epoch's figures to Ray Train and, from rank 0, a resumable checkpoint.

    Epochs that end within `cluster.checkpoint_every_s` seconds after the last checkpoint have none,
    but for the last epoch. Every report has the figures of all epochs so far. If a report is lost
    with its driver, the next one logs its epoch.
    """

    def __init__(self, training: Training, place: Place) -> None:
        self._training, self._place = training, place
        self._written = time.monotonic()  # when the last checkpoint was

    def __call__(self, session: Session, history: Sequence[Mapping[str, Any]]) -> None:
        """Reports the epoch that has ended."""
        from ray import train as ray_train

        from pipelines.terminal.progress import report_epoch

        metrics = {**history[-1], HISTORY: json.dumps(list(history))}
        if self._place.rank != 0:
            ray_train.report(metrics)
            return
        passed = time.monotonic() - self._written
        is_last = session.epoch == session.config.epochs
        if is_last or passed >= self._training.settings.cluster.checkpoint_every_s:
            self._report_checkpoint(session, history, metrics)
            self._written = time.monotonic()
        else:
            ray_train.report(metrics)
        shown = {name: value for name, value in history[-1].items() if not name.startswith(ROWS)}
        report_epoch(self._training.name, {"epochs": session.config.epochs, **shown})

    def _report_checkpoint(
        self, session: Session, history: Sequence[Mapping[str, Any]], metrics: dict[str, Any]
    ) -> None:
        from ray import train as ray_train

        training = self._training
        with scratch(training.settings.storage.root, "mantis-epoch") as folder:
            tensors, record = session.state()
            record = {**record, "key": training.key, "history": list(history)}
            save_training_state(folder, tensors, record)
            with writing(training.checkpoints):
                ray_train.report(metrics, checkpoint=ray_train.Checkpoint.from_directory(folder))


def ship(
    session: Session, training: Training, history: Sequence[Mapping[str, Any]], place: Place
) -> None:
    """Writes the best student to the stage's model folder, and the figures of all epochs."""
    meta = {
        "stage": training.name,
        "key": training.key,
        "metrics": session.best,
        "preparation": dict(training.preparation),
        COMPUTED_ON: computed_on(place.device, bf16=session.in_bf16, workers=place.world),
    }
    with scratch(training.settings.storage.root, "mantis-ship") as folder:
        session.recipe.save(session.best_student(), folder, training.kind, meta)
        store = Store(training.folder)
        store.upload_folder(folder, CHECKPOINT)
        store.write_json(f"{HISTORY}.json", list(history))
        store.write_json(BEST, session.best)


def _reporter(name: str) -> Callable[[Session, int, int, dict[str, float]], None]:
    from pipelines.terminal.progress import report_step

    def on_step(session: Session, done: int, steps: int, figures: dict[str, float]) -> None:
        place = {"epoch": session.step_index // session.steps_per_epoch + (done < steps)}
        counts = {"epochs": session.config.epochs, "step": done, "steps": steps}
        report_step(name, {**place, **counts, **figures})

    return on_step


def _set_threads(cluster: ClusterConfig, local_workers: int) -> None:
    wanted = cluster.threads_per_worker
    torch.set_num_threads(wanted or max(1, usable_cpus() // max(1, local_workers)))
