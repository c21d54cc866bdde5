"""The client half: stem, task detector, conditioning and encoder. Knows no decoder, no labels.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mantis_core.conditioning import CONDITIONING, Modulation, modulate
from mantis_core.config import ModelConfig
from mantis_core.latent import Latent


class View(NamedTuple):
    """What the client sees of images: stem features, the detector's pooled features, task logits.

    (B, C, H/4, W/4), (B, 2 * detector channels) and (B, K).
    """

    stem: Tensor
    pooled: Tensor
    logits: Tensor


def pool(x: Tensor) -> Tensor:
    """Mean and maximum over space, (B, C, h, w) to (B, 2 C)."""
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of about eight channels: no statistics that depend on the batch."""
    groups = next(g for g in (channels // 8 or 1, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; the first may halve the resolution.

    x ─┬─ conv3x3 (stride) ─ norm ─ ReLU ─ conv3x3 ─ norm ─┬─ modulation ─ ReLU ─▶
       └──────────── 1x1 (stride) where shapes differ ─────┘
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = group_norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = group_norm(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor, gamma_beta: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y)) + self.skip(x)
        return torch.relu(modulate(y, gamma_beta))


class SharedStem(nn.Sequential):
    """Task-agnostic first layers, (B, 3, H, W) to (B, channels, H/4, W/4); frozen in stage 2."""

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

    stem ─ conv3x3 s2 ─ residual blocks ─┬─ mean over space ─┬─ MLP ─▶ logits (B, K)
                                         └─ max over space ──┘

    Its own convolutions: pooling a two-layer stem alone caps detection.
    """

    def __init__(
        self, inputs: int, num_tasks: int, *, channels: int, blocks: int, hidden: int
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, 2, 1),
            group_norm(channels),
            nn.ReLU(),
            *(ResidualBlock(channels, channels) for _ in range(blocks)),
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * channels, hidden), nn.ReLU(), nn.Linear(hidden, num_tasks)
        )

    def forward(self, stem: Tensor) -> tuple[Tensor, Tensor]:
        """(B, inputs, H/4, W/4) to pooled features (B, 2 * channels) and each task's logit (B, K).

        The logits' sigmoid is p.
        """
        pooled = pool(self.body(stem))
        return pooled, self.mlp(pooled)


class FiLMedEncoder(nn.Module):
    """Stem features to the latent's map, modulated after every block and at the latent itself.

    stem ─ residual s2 ─ FiLM ─ [residual ─ FiLM] x blocks ─ conv1x1 ─ FiLM ─▶ y (B, C, h, w)

    `stride` is that from input to latent, 8 or 16; at 16 there are two halving blocks. Without
    latent channels it makes no map, and its pooled features alone are used.
    """

    def __init__(
        self, inputs: int, *, channels: int, blocks: int, latent_channels: int, stride: int
    ) -> None:
        super().__init__()
        halving = [ResidualBlock(inputs, channels, stride=2)]
        if stride == 16:
            halving.append(ResidualBlock(channels, channels, stride=2))
        self.blocks = nn.ModuleList(
            halving + [ResidualBlock(channels, channels) for _ in range(blocks)]
        )
        self.modulated_channels = (channels,) * len(self.blocks)
        self.to_latent: nn.Conv2d | None = None
        if latent_channels:
            self.to_latent = nn.Conv2d(channels, latent_channels, 1)
            self.modulated_channels += (latent_channels,)

    def forward(self, stem: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, Tensor]:
        """(B, inputs, H/4, W/4) to y (B, C, h, w) and the pooled features that it is made of.

        No modulation is the task-agnostic encoder.
        """
        layers = modulation or [None] * len(self.modulated_channels)
        x = stem
        for block, gamma_beta in zip(self.blocks, layers, strict=False):
            x = block(x, gamma_beta)
        if self.to_latent is None:
            return x[:, :0], pool(x)
        return modulate(self.to_latent(x), layers[-1]), pool(x)


class SummaryEncoder(nn.Module):
    """Pooled features of detector and encoder to the latent's summary of the whole image.

    pooled ─ norm ─ linear ─ FiLM ─ ReLU ─ linear + projection ─ FiLM ─▶ (B, G)

    What is known of an image as a whole takes a symbol here, and one a position in the map.
    """

    def __init__(self, inputs: int, *, hidden: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, channels)
        self.modulated_channels = (hidden, channels)

    def forward(
        self,
        pooled: Tensor,
        modulation: Modulation | None = None,
        projection: Tensor | None = None,
    ) -> Tensor:
        """(B, inputs) to (B, channels); `projection` (B, channels, hidden) as in Conditioned."""
        layers = modulation or [None] * len(self.modulated_channels)
        x = self.first(self.norm(pooled))[:, :, None, None]
        x = torch.relu(modulate(x, layers[0])).flatten(1)
        y = self.last(x)
        if projection is not None:
            y = y + torch.bmm(projection.to(x.dtype), x[:, :, None])[:, :, 0]
        return modulate(y[:, :, None, None], layers[1]).flatten(1)


def latent_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(h, w) of the latent of an input of (H, W) pixels."""
    height, width = image_size
    return -(-height // stride), -(-width // stride)


class Client(nn.Module):
    """All that runs on the device.

    x ─ stem ─┬─ detector ─┬─▶ p ─ conditioning ─▶ gamma, beta, projection
              │            └─ pooled ─┬─────────────────┤
              └───────── encoder ─────┴─ summary encoder ┴─▶ map, summary
    """

    def __init__(self, config: ModelConfig, num_tasks: int) -> None:
        super().__init__()
        encoder = config.encoder
        self.stem = SharedStem(config.stem.channels)
        self.detector = TaskDetector(self.stem.channels, num_tasks, **config.detector.model_dump())
        self.encoder = FiLMedEncoder(
            self.stem.channels,
            channels=encoder.channels,
            blocks=encoder.blocks,
            latent_channels=encoder.latent_channels,
            stride=encoder.stride,
        )
        modulated, projection = self.encoder.modulated_channels, (0, 0)
        self.summary: SummaryEncoder | None = None
        if encoder.summary_channels:
            self.summary = SummaryEncoder(
                2 * config.detector.channels + 2 * encoder.channels,
                hidden=encoder.summary_hidden,
                channels=encoder.summary_channels,
            )
            modulated += self.summary.modulated_channels
            projection = (encoder.summary_channels, encoder.summary_hidden)
        self.conditioning = CONDITIONING[config.conditioning.kind](
            num_tasks, modulated, projection, hidden=config.conditioning.hidden
        )

    def forward(self, x: Tensor) -> View:
        """Normalised images (B, 3, H, W) to all that the detector and the encoder go on from."""
        stem = self.stem(x)
        return View(stem, *self.detector(stem))

    def encode(self, view: View, probabilities: Tensor) -> Latent:
        """What was seen and p (B, K), or a multi-hot, to the latent, not yet rounded."""
        layers, projection = self.conditioning(probabilities)
        own = len(self.encoder.modulated_channels)
        y, pooled = self.encoder(view.stem, layers[:own])
        if self.summary is None:
            return Latent(y, y.new_zeros(len(y), 0))
        seen = torch.cat([view.pooled, pooled], dim=1)
        return Latent(y, self.summary(seen, layers[own:], projection))


def select_mask(probabilities: Tensor, threshold: Tensor | float, max_active: int) -> Tensor:
    """Which tasks a stream carries, bool (B, K), from p (B, K).

    Those above `threshold`, the most probable `max_active` at most, and the most probable one
    always.
    """
    best = probabilities.topk(min(max_active, probabilities.shape[1]), dim=1).indices
    allowed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, best, True)
    mask = allowed & (probabilities > threshold)
    return mask.scatter(1, best[:, :1], True)


def primary_task(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Index (B,) of the most probable task among the active ones, p and mask being (B, K)."""
    return probabilities.masked_fill(~mask, -1.0).argmax(dim=1)


def coverage_threshold(
    probabilities: Tensor, truth: Tensor, coverage: float, *, limit: int
) -> float:
    """The highest threshold, at most 0.5, that keeps the share `coverage` of the true tasks.

    Both are (N, K). An image's most probable task is kept whatever the threshold, and none beyond
    its `limit` most probable: only true tasks between them can be won by a lower threshold.
    """
    order = probabilities.argsort(dim=1, descending=True).argsort(dim=1)
    sure = int((truth & (order == 0)).sum())
    needed = math.ceil(coverage * int(truth.sum())) - sure
    others = probabilities[truth & (order > 0) & (order < limit)].sort(descending=True).values
    if needed <= 0 or len(others) == 0:
        return 0.5
    lowest = float(others[min(needed, len(others)) - 1])
    return min(0.5, lowest * (1 - 1e-6))
