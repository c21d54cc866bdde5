"""What trainings will take: multiply-adds, hours at assumed speeds, memory. Measures nothing.

`dry_build.py` counts a step of each training. The rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.stages.schedule import Schedule

if TYPE_CHECKING:
    from mantis_core.config import TrainingConfig
    from mantis_core.training.recipe import Recipe

GPU_FLOPS = 50e12
"""Operations a second that a training is assumed to get out of a GPU. A data-centre GPU reaches
that in bfloat16 with plain convolutions, and less with depthwise ones."""
CORE_FLOPS = 30e9
"""The same of a CPU core, in float32."""
PER_MAC = 2  # operations
HOUR_S = 3600.0
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
TIMES = ((48.0, 24.0, "days"), (1.0, 1.0, "h"), (1 / 60, 1 / 60, "min"), (0.0, 1 / HOUR_S, "s"))
"""From how many hours on a duration has a unit, the unit in hours, and its name."""


class Cost(NamedTuple):
    """What a training step costs.

    For one image `macs`, its multiply-adds forward and backward, the teacher's among them, and
    `saved_bytes`, what the forward pass keeps for the backward pass. Whatever the batch
    `held_bytes`: weights, gradients, the optimiser's state and the moving average. All in float32,
    and without the density of the latent, which adds little to both.
    """

    macs: int
    saved_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Effort:
    """What a whole training takes, estimated.

    `gpu_hours` and `core_hours` are those of one device of the assumed speed that does nothing
    else. They count neither reading images nor waiting. `worker_bytes` is the memory of a step in
    the worker of the largest batch.
    """

    macs_per_image: int
    macs: int
    gpu_hours: float
    core_hours: float
    worker_bytes: int

    def __str__(self) -> str:
        return (
            f"{_short(self.macs_per_image)} multiply-adds an image, {in_all(self.macs)}; a step "
            f"takes about {self.worker_bytes / 2**30:.1f} GiB a worker in float32"
        )


ASSUMED = (
    f"times are estimated, not measured: for one GPU that gets {GPU_FLOPS / 1e12:.0f} TFLOP/s out "
    f"of these networks, one CPU core that gets {CORE_FLOPS / 1e9:.0f} GFLOP/s, and images that "
    "are there when they are needed"
)
"""What the times assume, as a note for the user."""


def effort_of(cost: Cost, planned: Schedule) -> Effort | None:
    """Returns what a training takes; None while the number of its images is not known."""
    if planned.rows_per_epoch is None:
        return None
    macs = cost.macs * planned.rows_per_epoch * planned.epochs
    return Effort(
        macs_per_image=cost.macs,
        macs=macs,
        gpu_hours=_hours(macs, GPU_FLOPS),
        core_hours=_hours(macs, CORE_FLOPS),
        worker_bytes=cost.held_bytes + cost.saved_bytes * max(planned.worker_batch),
    )


def in_all(macs: int) -> str:
    """Returns a number of multiply-adds as text, with the time that they take."""
    gpu, core = _hours(macs, GPU_FLOPS), _hours(macs, CORE_FLOPS)
    return f"{_short(macs)} in all: {_time(gpu)} on a GPU, {_time(core)} on a CPU core"


def held_bytes(recipe: Recipe, training: TrainingConfig) -> int:
    """Returns the bytes that a training holds whatever its batch, see Cost."""
    student = recipe.student
    copies = {"adamw": 2, "sgd": int(training.optim.momentum > 0)}[training.optim.kind]
    trained = _bytes(each for each in student.parameters() if each.requires_grad)
    everything = _bytes([*recipe.parameters(), *recipe.buffers()])
    average = _bytes([*student.parameters(), *student.buffers()]) if training.ema_decay else 0
    return everything + trained * (1 + copies) + average


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _hours(macs: int, flops: float) -> float:
    return PER_MAC * macs / flops / HOUR_S


def _short(count: float) -> str:
    """Returns a number as text of three digits and a prefix of SI."""
    size, name = next((unit for unit in UNITS if count >= unit[0]), UNITS[-1])
    return f"{_digits(count / size)} {name}"


def _time(hours: float) -> str:
    _, size, name = next(each for each in TIMES if hours >= each[0])
    return f"{_digits(hours / size, 2)} {name}"


def _digits(value: float, digits: int = 3) -> str:
    """Returns a number of so many significant digits as text, without an exponent."""
    places = digits - 1 - (math.floor(math.log10(value)) if value else 0)
    return f"{round(value, places):,.{max(0, places)}f}"
