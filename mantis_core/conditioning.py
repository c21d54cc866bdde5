"""What turns task probabilities into modulation of en- and decoder: one class a kind, one dict.

Shapes: B batch, K tasks, C channels of a modulated layer, h w its height and width, D channels of
the detector's map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from mantis_core.task_field import MAX_LEVEL

Modulation = list[tuple[Tensor, Tensor] | None]
"""For each modulated layer gamma and beta, (B, C, 1, 1) or (B, C, h, w) each, None for identity."""


class Layers(NamedTuple):
    """What of an encoder can be conditioned.

    `channels` of each modulated layer. `steps`: positions of the detector's map to one of that
    layer's, each way; 0 for a layer without positions. `projection` is (G, N) of
    Conditioned.projection, zeros where there is no summary. `detector` is D.
    """

    channels: tuple[int, ...]
    steps: tuple[int, ...]
    projection: tuple[int, int]
    detector: int


class Conditioned(NamedTuple):
    """What an encoder does otherwise for an image's tasks.

    `projection` (B, G, N) is added to the matrix that projects N hidden units to the G symbols of
    the summary; None adds nothing.
    """

    layers: Modulation
    projection: Tensor | None = None


class FiLMGenerator(nn.Module):
    """Feature-wise linear modulation (Perez et al., AAAI 2018): gamma = 1 + delta.

    p (B, K) ─ linear ─ ReLU ─ linear (zero at init) ─▶ delta, beta for every layer

    The identity at init, whatever p is.
    """

    def __init__(self, num_tasks: int, channels: Sequence[int], *, hidden: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.first = nn.Linear(num_tasks, hidden)
        self.last = nn.Linear(hidden, 2 * sum(self.channels))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, probabilities: Tensor) -> Modulation:
        """(B, K) task probabilities, or a multi-hot, to gamma and beta per layer."""
        values = self.last(torch.relu(self.first(probabilities)))
        parts = values.split([2 * c for c in self.channels], dim=1)
        modulation: Modulation = []
        for part in parts:
            delta, beta = part[:, :, None, None].chunk(2, dim=1)
            modulation.append((1 + delta, beta))
        return modulation


def as_sent(probabilities: Tensor, mask: Tensor, *, levels: bool) -> Tensor:
    """What a stream says of the tasks, (B, K) from p (B, K) and the mask (B, K); no gradient.

    p to the nearest half bit, 1 to 2**-7.5, where a task is active, else 0; without `levels`, which
    a stream may leave out, 1 where active. The arithmetic of task_field.quantise_log2.
    """
    if not levels:
        return mask.float()
    steps = (-2 * probabilities.detach().float().clamp_min(1e-6).log2()).round()
    return torch.exp2(-steps.clamp(0, MAX_LEVEL) / 2) * mask


def modulate(x: Tensor, gamma_beta: tuple[Tensor, Tensor] | None) -> Tensor:
    """gamma * x + beta on (B, C, h, w), or x."""
    if gamma_beta is None:
        return x
    gamma, beta = gamma_beta
    return gamma * x + beta


class FiLMConditioning(nn.Module):
    """FiLM at every layer of the encoder, the same at every position."""

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.film = FiLMGenerator(num_tasks, layers.channels, hidden=hidden)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Conditioned:
        """(B, K) task probabilities, or a multi-hot; the map (B, D, h, w) is not looked at."""
        return Conditioned(self.film(probabilities))


class AttentionConditioning(nn.Module):
    """FiLM that differs from position to position: where is what the tasks are about?

    detector's map ─ conv1x1 ─ FiLM by p ─ ReLU ─ pooled to a layer's size ─ conv1x1 (0) ─▶ delta,
    beta (B, C, h, w) for every layer

    The detector has looked for the tasks at every position already; the encoder need not find out
    again. `tasks=False` is the ablation: the same without p.
    """

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int, tasks: bool = True) -> None:
        super().__init__()
        self.steps = layers.steps
        self.first = nn.Conv2d(layers.detector, hidden, 1)
        self.by_task = nn.Linear(num_tasks, 2 * hidden) if tasks else None
        last = [nn.Conv2d(hidden, 2 * channels, 1) for channels in layers.channels]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.last = nn.ModuleList(last)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Conditioned:
        """(B, K) task probabilities, or a multi-hot, and the detector's map (B, D, h, w)."""
        x = self.first(detected)
        if self.by_task is not None:
            delta, beta = self.by_task(probabilities)[:, :, None, None].chunk(2, dim=1)
            x = (1 + delta) * x + beta
        x = torch.relu(x)
        pooled = {0: x.mean(dim=(2, 3), keepdim=True), 1: x}
        modulation: Modulation = []
        for step, last in zip(self.steps, self.last, strict=True):
            if step not in pooled:
                pooled[step] = avg_pool2d(x, step, ceil_mode=True)
            delta, beta = last(pooled[step]).chunk(2, dim=1)
            modulation.append((1 + delta, beta))
        return Conditioned(modulation)


class ExpertConditioning(FiLMConditioning):
    """FiLM, and a projection of its own for each task, mixed by the tasks' probabilities.

    projection = sum over k of p_k E_k, after CondConv (Yang et al., NeurIPS 2019); E_k zero at
    init. Ten classes of one task lie along fewer directions than the classes of all tasks, and
    FiLM alone scales directions, it does not turn them. Where there is no summary it is FiLM alone.
    """

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__(num_tasks, layers, hidden=hidden)
        self.experts: nn.Parameter | None = None
        if all(layers.projection):
            self.experts = nn.Parameter(torch.zeros(num_tasks, *layers.projection))

    def forward(self, probabilities: Tensor, detected: Tensor) -> Conditioned:
        """(B, K) task probabilities, or a multi-hot; the map (B, D, h, w) is not looked at."""
        if self.experts is None:
            return super().forward(probabilities, detected)
        mixed = torch.einsum("bk,kgn->bgn", probabilities.to(self.experts.dtype), self.experts)
        return Conditioned(self.film(probabilities), mixed)


class NoConditioning(nn.Module):
    """The ablation: the encoder knows nothing of tasks."""

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.layers = len(layers.channels)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Conditioned:
        """Neither is looked at; every layer stays as it is."""
        return Conditioned([None] * self.layers)


CONDITIONING: dict[str, Callable[..., nn.Module]] = {
    "film": FiLMConditioning,
    "attention": AttentionConditioning,
    "features": partial(AttentionConditioning, tasks=False),
    "experts": ExpertConditioning,
    "none": NoConditioning,
}
