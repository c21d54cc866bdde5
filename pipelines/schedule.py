"""How a training stage spends its rows: workers, batches, steps, told before it runs. Runs nothing.

The global batch is fixed by the config whatever the number of workers, so none of the counts here,
and no learning rate, changes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.plan import TRAINING_KINDS, StageSpec
from pipelines.settings import ClusterConfig
from pipelines.settings_errors import SettingsError
from pipelines.trainer import training_config


@dataclass(frozen=True)
class Schedule:
    """One training. `workers` and `worker_batch` (rows of a step on one worker) are those of the
    fewest and of the most workers. What counts rows is None until `prepare` has counted them."""

    workers: tuple[int, int]
    global_batch: int
    worker_batch: tuple[int, int]
    learning_rate: float
    epochs: int
    rows: int | None
    rows_per_epoch: int | None
    rows_left_out: int | None
    steps_per_epoch: int | None
    steps: int | None

    def __str__(self) -> str:
        batches = f"{self.workers[0]} x {self.worker_batch[0]}"
        if self.workers[0] != self.workers[1]:
            batches += f" to {self.workers[1]} x {self.worker_batch[1]}"
        told = "rows and steps are known after prepare"
        if self.rows is not None:
            told = (
                f"{self.rows_per_epoch} of {self.rows} rows an epoch ({self.rows_left_out} left "
                f"out, others in the next), {self.steps_per_epoch} steps, {self.steps} in all"
            )
        return (
            f"{told}; batch {self.global_batch} = {batches}; learning rate "
            f"{self.learning_rate:g}, not scaled by workers"
        )


def schedule(spec: StageSpec, rows: int | None) -> Schedule | None:
    """The schedule of a stage over so many training rows; None for a stage that trains nothing."""
    if spec.kind not in TRAINING_KINDS:
        return None
    cluster, training = spec.settings.cluster, training_config(spec.settings, spec.kind)
    counts, batch = (cluster.min_workers, cluster.max_workers), training.batch_size
    steps = None if rows is None else rows // batch
    return Schedule(
        workers=counts,
        global_batch=batch,
        worker_batch=(batch // counts[0], batch // counts[1]),
        learning_rate=training.optim.lr,
        epochs=training.epochs,
        rows=rows,
        rows_per_epoch=None if steps is None else steps * batch,
        rows_left_out=None if rows is None else rows % batch,
        steps_per_epoch=steps,
        steps=None if steps is None else steps * training.epochs,
    )


def check_batches(specs: Iterable[StageSpec]) -> None:
    """Raises SettingsError where a global batch does not divide among the workers it may get."""
    for spec in specs:
        if spec.kind in TRAINING_KINDS:
            batch = training_config(spec.settings, spec.kind).batch_size
            _check_batch(spec.name, batch, spec.settings.cluster)


def _check_batch(stage: str, batch: int, cluster: ClusterConfig) -> None:
    counts = range(cluster.min_workers, cluster.max_workers + 1)
    odd = [str(count) for count in counts if batch % count]
    if not odd:
        return
    divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
    told = f"cluster.workers {cluster.workers}"
    if len(counts) > 1:
        told = f"cluster.workers [{counts[0]}, {counts[-1]}] allows every number between"
    raise SettingsError(
        f"{told}: the batch_size {batch} of {stage} does not divide among {' or '.join(odd)} "
        f"workers. It divides among {divisors}; or use a batch_size that is a multiple of "
        f"{math.lcm(*counts)}"
    )
