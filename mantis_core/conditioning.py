"""What turns task probabilities into modulation of en- and decoder: one class a kind, one dict.

Shapes: B batch, K tasks, C channels of a modulated layer, h w its height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mantis_core.task_field import MAX_LEVEL

Modulation = list[tuple[Tensor, Tensor] | None]
"""For each modulated layer gamma and beta, (B, C, 1, 1) each, or None for identity."""


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
    """FiLM at every layer of the encoder."""

    def __init__(
        self, num_tasks: int, channels: Sequence[int], summary: tuple[int, int], *, hidden: int
    ) -> None:
        """`channels` of the modulated layers; `summary` is (G, N) of Conditioned.projection."""
        super().__init__()
        self.film = FiLMGenerator(num_tasks, channels, hidden=hidden)

    def forward(self, probabilities: Tensor) -> Conditioned:
        """(B, K) task probabilities, or a multi-hot."""
        return Conditioned(self.film(probabilities))


class ExpertConditioning(FiLMConditioning):
    """FiLM, and a projection of its own for each task, mixed by the tasks' probabilities.

    projection = sum over k of p_k E_k, after CondConv (Yang et al., NeurIPS 2019); E_k zero at
    init. Ten classes of one task lie along fewer directions than the classes of all tasks, and
    FiLM alone scales directions, it does not turn them. Where there is no summary it is FiLM alone.
    """

    def __init__(
        self, num_tasks: int, channels: Sequence[int], summary: tuple[int, int], *, hidden: int
    ) -> None:
        super().__init__(num_tasks, channels, summary, hidden=hidden)
        self.experts = nn.Parameter(torch.zeros(num_tasks, *summary)) if all(summary) else None

    def forward(self, probabilities: Tensor) -> Conditioned:
        """(B, K) task probabilities, or a multi-hot."""
        if self.experts is None:
            return super().forward(probabilities)
        mixed = torch.einsum("bk,kgn->bgn", probabilities.to(self.experts.dtype), self.experts)
        return Conditioned(self.film(probabilities), mixed)


class NoConditioning(nn.Module):
    """The ablation: the encoder knows nothing of tasks."""

    def __init__(
        self, num_tasks: int, channels: Sequence[int], summary: tuple[int, int], *, hidden: int
    ) -> None:
        super().__init__()
        self.layers = len(channels)

    def forward(self, probabilities: Tensor) -> Conditioned:
        """(B, K) is not looked at; every layer stays as it is."""
        return Conditioned([None] * self.layers)


CONDITIONING: dict[str, Callable[..., nn.Module]] = {
    "film": FiLMConditioning,
    "experts": ExpertConditioning,
    "none": NoConditioning,
}
