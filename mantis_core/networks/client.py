"""The client half: stem, task detector, conditioning and encoder. Knows no decoder, no labels.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mantis_core.architecture import ModelConfig
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import (
    ResidualBlock,
    group_norm,
    modulate,
    pool,
    without_autocast,
)
from mantis_core.networks.conditioning import (
    CONDITIONING,
    Layers,
    LevelModulation,
    Modulation,
    one_after_another,
)


class View(NamedTuple):
    """What the client sees of images: stem features, the detector's map, task and class logits.

    (B, C, H/4, W/4), (B, D, H/8, W/8), (B, K), and (B, classes + 1), the last one
    for "none of them": None for a detector that names tasks alone.
    """

    stem: Tensor
    detected: Tensor
    logits: Tensor
    class_logits: Tensor | None = None


class SharedStem(nn.Sequential):
    """Task-agnostic first layers, (B, 3, H, W) to (B, channels, H/4, W/4)."""

    def __init__(self, channels: tuple[int, int]) -> None:
        first, second = channels
        super().__init__(
            nn.Conv2d(3, first, 5, 2, 2),
            group_norm(first),
            nn.ReLU(),
            ResidualBlock(first, second, stride=2),
        )
        self.channels = second


class TaskDetector(nn.Module):
    """Which tasks an image is about, from stem features.

    stem ─ conv3x3 s2 ─ residual blocks ─┬────────────────────────┬─ map ─┬─ mean over space ─┐
                                         └─ residual s2 ─ enlarge ┘       └─ max over space ──┴─ MLP

    It has convolutions of its own: pooling a two-layer stem alone caps detection. With `members`
    (K, n), the classes of each task, the MLP names classes: a class says more about what to look
    for than a task does. The probability of a task is then the sum over its classes.
    """

    members: Tensor | None
    sides: Tensor | None

    def __init__(
        self,
        inputs: int,
        num_tasks: int,
        *,
        channels: int,
        blocks: int,
        hidden: int,
        deep_channels: int = 0,
        members: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels + deep_channels
        self.register_buffer("members", members, persistent=False)
        sides = None if members is None else sides_of(members)
        self.register_buffer("sides", sides, persistent=False)
        outputs = num_tasks
        if members is not None:
            classless = int((~members.any(dim=1)).sum())
            outputs = members.shape[1] + 1 + classless
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, 2, 1),
            group_norm(channels),
            nn.ReLU(),
            *(ResidualBlock(channels, channels) for _ in range(blocks)),
        )
        self.deep: nn.Module | None = None
        if deep_channels:
            self.deep = ResidualBlock(channels, deep_channels, stride=2)
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.channels, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, stem: Tensor) -> View:
        """(B, inputs, H/4, W/4) to a view; the sigmoid of a task's logit is p.

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

    members = sides = None
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


class FiLMedEncoder(nn.Module):
    """Features to the latent, modulated after every block and at the latent itself.

    features ─ residual ─ FiLM ─ [residual ─ FiLM] x blocks ─ conv1x1 ─ FiLM ─▶ y (B, C, h, w)

    `stride` is that from input to latent, 8 or 16, `before` that from input to the features, 4 or
    8. The first block halves features of stride 4; at 16 there is one more that halves.
    """

    def __init__(
        self,
        inputs: int,
        *,
        channels: int,
        blocks: int,
        latent_channels: int,
        stride: int,
        before: int = 4,
    ) -> None:
        super().__init__()
        halving = [ResidualBlock(inputs, channels, stride=8 // before)]
        if stride == 16:
            halving.append(ResidualBlock(channels, channels, stride=2))
        self.blocks = nn.ModuleList(
            halving + [ResidualBlock(channels, channels) for _ in range(blocks)]
        )
        self.to_latent = nn.Conv2d(channels, latent_channels, 1)
        self.modulated_channels = (channels,) * len(self.blocks) + (latent_channels,)
        self.modulated_steps = (1, *(stride // 8,) * len(self.blocks))

    def forward(
        self,
        features: Tensor,
        modulation: Modulation | None = None,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, inputs, H/before, W/before) to y (B, C, h, w), float32, under autocast too.

        No modulation is the task-agnostic encoder. `keep` is given the features that the latent is
        made of, (B, channels, h, w).
        """
        layers = modulation or [None] * len(self.modulated_channels)
        x = features
        for block, gamma_beta in zip(self.blocks, layers, strict=False):
            x = block(x, gamma_beta)
        if keep is not None:
            keep.append(x)
        with without_autocast(x):
            latent = self.to_latent(x.float())
        return modulate(latent, layers[-1])


class ExitHeads(nn.Module):
    """A client's own answers to what it is asked, from the encoder's modulated features.

    features ─ mean and max over space ─ linear ─ ReLU ─ linear ─▶ logits of all labels
    """

    def __init__(self, channels: int, labels: Sequence[int]) -> None:
        """`labels` (K,) are the tasks' numbers of labels, 0 for a task without a head."""
        super().__init__()
        self.labels = tuple(labels)
        width = 2 * channels
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, sum(self.labels))
        )

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, channels, h, w) to the logits of each task (B, its labels), float32."""
        with without_autocast(features):
            logits = self.mlp(pool(features.float()))
        return torch.split(logits, list(self.labels), dim=1)


class Coding(NamedTuple):
    """What the encoder makes of images: the latent (B, C, h, w), and the client's own answers.

    The latter are logits of each task (B, its labels), None for a client without exit heads.
    """

    latent: Tensor
    exits: tuple[Tensor, ...] | None


def latent_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(h, w) of the latent of an input of (H, W) pixels."""
    height, width = image_size
    return -(-height // stride), -(-width // stride)


class Client(nn.Module):
    """The half that runs on the device.

    x ─ stem ─┬─ detector ─▶ p, its map ─ conditioning ─▶ gamma, beta
              └───────────────── encoder ──────────────┴─▶ y

    With `encoder.start` "detector" the encoder begins at the detector's map instead. A client of
    several rates is modulated by the rate level too, after the tasks.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        members: Tensor | None = None,
        *,
        num_rates: int = 1,
        labels: Sequence[int] = (),
    ) -> None:
        """`members` (K, classes) are the classes of each task, where images have one class each.

        `labels` (K,) are the tasks' numbers of labels for a client with exit heads, 0 for a task
        without one; () leaves the heads out.
        """
        super().__init__()
        encoder, detector = config.encoder, config.detector
        if detector.classes and members is None:
            raise ModelError(
                "model.detector.classes needs images of one class each; this data has images of "
                "several tasks: set it to false"
            )
        self.stem = SharedStem(config.stem.channels)
        self.detector: TaskDetector | NoDetector = (
            NoDetector(num_tasks)
            if config.wide_encoder or config.requests == "asked"
            else TaskDetector(
                self.stem.channels,
                num_tasks,
                channels=detector.channels,
                blocks=detector.blocks,
                hidden=detector.hidden,
                deep_channels=detector.deep_channels,
                members=members if detector.classes else None,
            )
        )
        self.behind_detector = encoder.start == "detector" and not config.wide_encoder
        self.encoder = FiLMedEncoder(
            self.detector.channels if self.behind_detector else self.stem.channels,
            before=8 if self.behind_detector else 4,
            channels=encoder.channels,
            blocks=encoder.blocks,
            latent_channels=encoder.latent_channels,
            stride=encoder.stride,
        )
        self.conditioning = CONDITIONING[config.conditioning.kind](
            num_tasks,
            Layers(
                self.encoder.modulated_channels,
                self.encoder.modulated_steps,
                self.detector.channels,
            ),
            hidden=config.conditioning.hidden,
        )
        self.exits: ExitHeads | None = None
        if any(labels):
            self.exits = ExitHeads(encoder.channels, labels)
        self.by_level: LevelModulation | None = None
        if num_rates > 1:
            self.by_level = LevelModulation(num_rates, self.encoder.modulated_channels)

    def forward(self, x: Tensor) -> View:
        """Normalised images (B, 3, H, W) to what the detector says and the encoder starts from."""
        return self.detector(self.stem(x))  # type: ignore[no-any-return]

    def encode(self, view: View, probabilities: Tensor, shares: Tensor | None = None) -> Tensor:
        """As `code`, the latent alone."""
        return self.code(view, probabilities, shares).latent

    def code(self, view: View, probabilities: Tensor, shares: Tensor | None = None) -> Coding:
        """A view and p (B, K), or a multi-hot, to the latent, not rounded, and own answers.

        `shares` (B, L) are those of the rates, for a client of several.
        """
        layers = self.conditioning(probabilities, view.detected)
        if self.by_level is not None:
            assert shares is not None
            layers = one_after_another(layers, self.by_level(shares))
        features = view.detected if self.behind_detector else view.stem
        if self.exits is None:
            return Coding(self.encoder(features, layers), None)
        deep: list[Tensor] = []
        latent = self.encoder(features, layers, deep)
        return Coding(latent, self.exits(deep[0]))

    def for_detection_alone(self) -> nn.Module:
        """The part of the detector that the latent does not need."""
        if not self.behind_detector:
            return self.detector
        assert isinstance(self.detector, TaskDetector)
        return self.detector.mlp
