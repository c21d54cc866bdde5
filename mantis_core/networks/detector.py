"""What finds the tasks of an image on the client: a detector of tasks or of classes.

Shapes: B batch, K tasks, D channels of the detector's map, H W input pixels, S the stem's stride.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mantis_core.architecture import DetectorConfig
from mantis_core.networks.blocks import ResidualBlock, group_norm, pool, without_autocast
from mantis_core.networks.lite import LiteBlocks


class View(NamedTuple):
    """What the client sees of images: stem features, the detector's map, task and class logits.

    (B, C, H/S, W/S), (B, D, H/8, W/8), (B, K), and (B, classes + 1), the last one
    for "none of them": None for a detector that names tasks alone.
    """

    stem: Tensor
    detected: Tensor
    logits: Tensor
    class_logits: Tensor | None = None


class TaskDetector(nn.Module):
    """Which tasks an image is about, from stem features.

    stem ─ body ─┬──────────────────┬─ map ─┬─ mean over space ─┐
                 └─ deep ─ enlarge ─┘       └─ max over space ──┴─ MLP

    It has blocks of its own: pooling a two-layer stem alone caps detection. With `members` (K, n),
    the classes of each task, the MLP names classes: a class says more about what to look for than a
    task does. The probability of a task is then the sum over its classes.
    """

    members: Tensor | None
    sides: Tensor | None

    def __init__(
        self,
        body: nn.Module,
        deep: nn.Module | None,
        num_tasks: int,
        *,
        channels: int,
        hidden: int,
        members: Tensor | None = None,
    ) -> None:
        """`channels` has the map: those of `body`, at a stride of 8 pixels, and those of `deep`."""
        super().__init__()
        self.channels = channels
        self.register_buffer("members", members, persistent=False)
        sides = None if members is None else sides_of(members)
        self.register_buffer("sides", sides, persistent=False)
        outputs = num_tasks
        if members is not None:
            classless = int((~members.any(dim=1)).sum())
            outputs = members.shape[1] + 1 + classless
        self.body, self.deep = body, deep
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.channels, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, stem: Tensor) -> View:
        """(B, C, H/S, W/S) to a view; the sigmoid of a task's logit is p.

        Logits are float32, under autocast too: they are compared with each other and a threshold.
        """
        detected = self.body(stem)
        if self.deep is not None:
            deep = interpolate(self.deep(detected), size=detected.shape[2:])
            detected = torch.cat([detected, deep], dim=1)
        with without_autocast(stem):
            logits = self.mlp(pool(detected.float()))
        if self.sides is None:
            return View(stem, detected, logits)
        count = self.sides.shape[2]
        class_logits, own = logits[:, :count], logits[:, count:]
        return View(stem, detected, task_logits(class_logits, own, self.sides), class_logits)


class NoDetector(nn.Module):
    """In place of a detector, for a client that detects nothing. Computes nothing."""

    members = sides = deep = None
    channels = 0

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    def forward(self, stem: Tensor) -> View:
        """A view in which all tasks are equally probable."""
        return View(stem, stem, stem.new_zeros(len(stem), self.num_tasks, dtype=torch.float32))


def sides_of(members: Tensor) -> Tensor:
    """What `task_logits` leaves out, (2, K, n + 1): places outside a task's classes, inside them.

    `members` (K, n). A task without classes has "none of them", so that its sums, which nobody
    reads, are finite.
    """
    inside = torch.cat([members, ~members.any(dim=1, keepdim=True)], dim=1)
    return torch.stack([~inside, inside])


def task_logits(class_logits: Tensor, own: Tensor, sides: Tensor) -> Tensor:
    """log p - log(1 - p) of each task (B, K), p being the softmax summed over the task's classes.

    `class_logits` (B, n + 1), `sides` (2, K, n + 1); tasks without classes have logits of their
    `own`, (B, those tasks).
    """
    scores = class_logits[:, None, None].masked_fill(sides, -torch.inf)
    mine, others = scores.logsumexp(dim=3).unbind(1)
    if not own.shape[1]:
        return mine - others
    classless = sides[1, :, -1]
    place = (classless.cumsum(0) - 1).clamp_min(0)  # among the logits of their own
    return torch.where(classless, own.index_select(1, place), mine - others)


def detector_of(
    detector: DetectorConfig,
    num_tasks: int,
    members: Tensor | None,
    *,
    inputs: int,
    lite: bool = False,
) -> TaskDetector:
    """The detector of a client behind a stem of `inputs` channels, with random weights.

    `lite`: behind EfficientNet-Lite0's first blocks, whose next ones it has.
    """
    channels, deep_channels = detector.channels, detector.deep_channels
    deep: nn.Module | None = None
    if lite:
        body: nn.Module = nn.Identity()
        deep = blocks = LiteBlocks(detector.blocks)
        channels, deep_channels = inputs, blocks.channels
    else:
        body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, 2, 1),
            group_norm(channels),
            nn.ReLU(),
            *(ResidualBlock(channels, channels) for _ in range(detector.blocks)),
        )
        if deep_channels:
            deep = ResidualBlock(channels, deep_channels, stride=2)
    return TaskDetector(
        body,
        deep,
        num_tasks,
        channels=channels + deep_channels,
        hidden=detector.hidden,
        members=members if detector.classes else None,
    )
