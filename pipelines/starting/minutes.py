"""Estimates how long a run takes: times a few steps of the teacher on this machine.

A training step of a codec is taken to cost about as much as one of its teacher, whose blocks it
runs as well. Only the teacher's speed is measured; the factors and fixed times below are rough.
"""

from __future__ import annotations

import operator
import os
import time
from dataclasses import dataclass

from pipelines.starting.numbers import Numbers

STEP_S = 3.0  # of timing
STAGE1, STAGE2 = 1.0, 1.1  # times the teacher's seconds an image
ARMS = 5.0  # forward passes an evaluated image takes, over all arms
START_S = 20.0  # of each stage with Ray: processes, imports
EPOCH_S = 0.6  # of each epoch: held-back images, a checkpoint
READ_S = 0.003  # of an image in `prepare`, on one core


@dataclass(frozen=True)
class Estimate:
    """How long a run takes, and how that was found."""

    minutes: float
    how: str


def estimate(numbers: Numbers, teacher: str, classes: int, cpus: int) -> Estimate:
    """Times a few training steps of the teacher, then adds up the stages. Loads torch."""
    seconds = seconds_an_image(teacher, numbers.image_size, numbers.batch_size, classes, cpus)
    where = f"{cpus} CPU cores" if cpus > 1 else "one CPU core"
    if numbers.gpus:
        where = "this GPU"
    how = (
        f"from some steps of {teacher} timed on {where} ({1 / seconds:,.0f} images a second), "
        "and a rough share for the other stages"
    )
    return Estimate(total_seconds(numbers, seconds, cpus) / 60, how)


def total_seconds(numbers: Numbers, seconds_an_image: float, cpus: int) -> float:
    """Returns the seconds of a whole run, from those that the teacher trains on one image."""
    epochs = (numbers.teacher_epochs, numbers.stage1_epochs, numbers.stage2_epochs)
    passes: float = sum(map(operator.mul, (1.0, STAGE1, STAGE2), epochs))
    training = passes * numbers.train_rows * seconds_an_image
    evaluation = ARMS * numbers.val_rows * seconds_an_image / 3
    reading = READ_S * (numbers.train_rows + numbers.val_rows) / max(1, cpus)
    return training + evaluation + reading + EPOCH_S * sum(epochs) + START_S * 6


def seconds_an_image(name: str, side: int, batch: int, classes: int, cpus: int) -> float:
    """Returns the seconds that a training step of a network takes for each of its images.

    The fastest of some steps counts: the others share the machine with something else.
    """
    import torch
    import torchvision
    from torch.nn.functional import cross_entropy

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cpus))
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net = torchvision.models.get_model(name, weights=None, num_classes=classes).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        images = torch.rand(batch, 3, side, side, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        times: list[float] = []
        while len(times) < 3 or sum(times) < STEP_S:
            began = time.monotonic()
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - began)
        return min(times) / batch
    finally:
        torch.set_num_threads(threads)


def usable_cpus() -> int:
    """Returns the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
