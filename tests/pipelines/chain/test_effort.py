"""What trainings will take: the arithmetic and its words. Builds no network of a stage."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mantis_core.config import OptimConfig, TrainingConfig
from pipelines.chain.effort import CORE_FLOPS, GPU_FLOPS, Cost, effort_of, held_bytes, in_all
from pipelines.stages.schedule import Schedule

PLANNED = Schedule(
    workers=(1, 4),
    global_batch=256,
    worker_batch=(256, 64),
    learning_rate=1e-3,
    epochs=12,
    rows=1_268_000,
    rows_per_epoch=1_267_968,
    rows_left_out=32,
    steps_per_epoch=4953,
    steps=59_436,
)
COST = Cost(macs=3_210_000_000, saved_bytes=70 * 2**20, held_bytes=136 * 2**20)


def test_a_training_takes_its_steps_on_every_image_of_every_epoch() -> None:
    effort = effort_of(COST, PLANNED)
    assert effort is not None
    assert effort.macs == 3_210_000_000 * 1_267_968 * 12
    assert effort.gpu_hours == pytest.approx(2 * effort.macs / GPU_FLOPS / 3600)
    assert effort.gpu_hours / effort.core_hours == pytest.approx(CORE_FLOPS / GPU_FLOPS)
    assert effort.worker_bytes == (136 + 70 * 256) * 2**20  # in the worker of the largest batch
    assert str(effort) == (
        "3.21 G multiply-adds an image, 48.8 P in all: 33 min on a GPU, 38 days on a CPU core; a "
        "step takes about 17.6 GiB a worker in float32"
    )


def test_nothing_is_said_while_the_images_are_not_counted() -> None:
    assert effort_of(COST, replace(PLANNED, rows_per_epoch=None)) is None


@pytest.mark.parametrize(
    ("macs", "words"),
    [
        (999_000_000, "999 M in all: 0.000040 s on a GPU, 0.067 s on a CPU core"),
        (37 * 10**12, "37.0 T in all: 1.5 s on a GPU, 41 min on a CPU core"),
        (4 * 10**17, "400 P in all: 4.4 h on a GPU, 310 days on a CPU core"),
        (10**19, "10,000 P in all: 4.6 days on a GPU, 7,700 days on a CPU core"),
    ],
)
def test_sizes_and_times_are_said_in_units_that_fit(macs: int, words: str) -> None:
    assert in_all(macs) == words


@pytest.mark.parametrize(
    ("optim", "ema", "copies"),
    [
        ({"kind": "adamw"}, 0.9, 2),
        ({"kind": "sgd", "momentum": 0.9}, 0.0, 1),
        ({"kind": "sgd", "momentum": 0.0}, 0.0, 0),
    ],
)
def test_a_training_holds_gradients_and_the_optimisers_state_of_what_it_trains(
    optim: dict[str, Any], ema: float, copies: int
) -> None:
    student = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
    student[0].requires_grad_(False)
    teacher = nn.Linear(10, 10, bias=False)
    recipe: Any = SimpleNamespace(
        student=student,
        parameters=lambda: [*student.parameters(), *teacher.parameters()],
        buffers=lambda: [torch.zeros(3)],
    )
    training = TrainingConfig(optim=OptimConfig(**optim), ema_decay=ema)
    floats = 32 + 16 + 100 + 3 + 16 * (1 + copies) + (48 if ema else 0)
    assert held_bytes(recipe, training) == 4 * floats
