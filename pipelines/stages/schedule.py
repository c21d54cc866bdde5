"""The schedule of a training before it runs: workers, batches, steps. Runs nothing.

The config fixes the global batch. Steps and learning rate therefore do not depend on the number of
workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.settings.errors import SettingsError
from pipelines.settings.sections import ClusterConfig
from pipelines.stages.spec import StageSpec


@dataclass(frozen=True)
class Schedule:
    """The schedule of one training.

    `workers` are the fewest and the most; `worker_batch` are the rows of one worker in one step for
    each of the two. Counts of rows and steps are None until `prepare` has finished.
    """

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
        counts = "rows and steps are known after prepare"
        if self.rows is not None:
            counts = (
                f"{self.rows_per_epoch} of {self.rows} rows per epoch ({self.rows_left_out} left "
                f"out, others in the next), {self.steps_per_epoch} steps, {self.steps} in total"
            )
        return (
            f"{counts}; batch {self.global_batch} = {batches}; learning rate "
            f"{self.learning_rate:g}, not scaled by workers"
        )


def schedule(spec: StageSpec, rows: int | None) -> Schedule | None:
    """Returns the schedule of a stage with `rows` training rows; None if it trains nothing."""
    if not spec.stage.trains:
        return None
    cluster, training = spec.settings.cluster, spec.training
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
    """Raises SettingsError if a global batch does not divide evenly among its workers."""
    for spec in specs:
        if spec.stage.trains:
            _check_batch(spec.name, spec.training.batch_size, spec.settings.cluster)


def _check_batch(stage: str, batch: int, cluster: ClusterConfig) -> None:
    counts = range(cluster.min_workers, cluster.max_workers + 1)
    odd = [str(count) for count in counts if batch % count]
    if not odd:
        return
    divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
    setting = f"cluster.workers {cluster.workers}"
    if len(counts) > 1:
        setting = f"cluster.workers [{counts[0]}, {counts[-1]}] allows every number between"
    raise SettingsError(
        f"{setting}: the batch_size {batch} of {stage} does not divide among {' or '.join(odd)} "
        f"workers. It divides among {divisors}. Set one of these, or a batch_size that "
        f"is a multiple of {math.lcm(*counts)}"
    )
