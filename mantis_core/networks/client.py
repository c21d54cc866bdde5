"""The client half: stem, detector, conditioning and encoder. Knows no decoder, no labels.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size, S the stem's stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
from mantis_core.networks.detector import NoDetector, TaskDetector, View, detector_of
from mantis_core.networks.lite import LiteStem


class SharedStem(nn.Sequential):
    """Task-agnostic first layers, (B, 3, H, W) to (B, channels, H/4, W/4)."""

    stride = 4

    def __init__(self, channels: tuple[int, int]) -> None:
        first, second = channels
        super().__init__(
            nn.Conv2d(3, first, 5, 2, 2),
            group_norm(first),
            nn.ReLU(),
            ResidualBlock(first, second, stride=2),
        )
        self.channels = second


class FiLMedEncoder(nn.Module):
    """Features to the latent, modulated after every block and at the latent itself.

    features ─ residual ─ FiLM ─ [residual ─ FiLM] x blocks ─ conv1x1 ─ FiLM ─▶ y (B, C, h, w)

    `before` is the stride from input to features, `strides` those of the first blocks from there.
    """

    def __init__(
        self,
        inputs: int,
        *,
        channels: int,
        blocks: int,
        latent_channels: int,
        before: int,
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        widths = (inputs, *[channels] * len(strides))
        halving = [
            ResidualBlock(width, channels, stride=stride)
            for width, stride in zip(widths, strides, strict=False)
        ]
        self.blocks = nn.ModuleList(
            halving + [ResidualBlock(channels, channels) for _ in range(blocks)]
        )
        self.to_latent = nn.Conv2d(channels, latent_channels, 1)
        self.modulated_channels = (channels,) * len(self.blocks) + (latent_channels,)
        reached = [step // 8 for step in accumulate(strides, mul, initial=before)][1:]
        self.modulated_steps = (*reached, *[reached[-1]] * (blocks + 1))

    def forward(
        self,
        features: Tensor,
        modulation: Modulation | None = None,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, inputs, ...) at a stride of `before` to y (B, C, h, w), float32, under autocast too.

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


def stem_of(config: ModelConfig) -> SharedStem | LiteStem:
    """The stem of a client, with random weights."""
    return LiteStem() if config.client == "lite0" else SharedStem(config.stem.channels)


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
        encoder = config.encoder
        if config.detector.classes and members is None:
            raise ModelError(
                "model.detector.classes needs images of one class each; this data has images of "
                "several tasks: set it to false"
            )
        self.stem: SharedStem | LiteStem = stem_of(config)
        self.detector: TaskDetector | NoDetector = (
            NoDetector(num_tasks)
            if config.wide_encoder or config.requests == "asked"
            else detector_of(
                config.detector,
                num_tasks,
                members,
                inputs=self.stem.channels,
                lite=config.client == "lite0",
            )
        )
        self.behind_detector = encoder.start == "detector" and not config.wide_encoder
        before = 8 if self.behind_detector else self.stem.stride
        strides = [8 // before, *[2] * (encoder.stride == 16)]
        if config.client == "lite0":
            strides = [encoder.stride // before]
        self.encoder = FiLMedEncoder(
            self.detector.channels if self.behind_detector else self.stem.channels,
            channels=encoder.channels,
            blocks=encoder.blocks,
            latent_channels=encoder.latent_channels,
            before=before,
            strides=strides,
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
