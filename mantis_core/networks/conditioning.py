"""From task probabilities to modulation of the encoder: a class for each kind, and one dict.

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

from mantis_core.rates import BETWEEN

_OPEN = 0.3  # the parameter of a channel's gate at init
_GATE_SCALE = 5.0  # its logit is that much more: Adam moves any parameter by about its rate a step
_LEAST = 1e-6  # p that others are relative to

Modulation = list[tuple[Tensor, Tensor] | None]
"""For each modulated layer gamma and beta, (B, C, 1, 1) or (B, C, h, w) each, None for identity.

float32, under autocast too: near 1, bfloat16 has steps of 1/128 and would round a small delta away.
"""


class Layers(NamedTuple):
    """The layers of an encoder that can be conditioned.

    `channels` of each modulated layer. `steps`: how many positions of the detector's map one
    position of that layer spans, each way. `detector` is D.
    """

    channels: tuple[int, ...]
    steps: tuple[int, ...]
    detector: int


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
        sizes = [c for channels in self.channels for c in (channels, channels)]
        parts = values[:, :, None, None].float().split(sizes, dim=1)
        return [(1 + delta, beta) for delta, beta in zip(parts[::2], parts[1::2], strict=True)]


class FiLMConditioning(nn.Module):
    """FiLM at every layer of the encoder, the same at every position."""

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.film = FiLMGenerator(num_tasks, layers.channels, hidden=hidden)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """(B, K) task probabilities, or a multi-hot; the map (B, D, h, w) is ignored."""
        return self.film(probabilities)  # type: ignore[no-any-return]


class AttentionConditioning(nn.Module):
    """FiLM that differs from position to position: where is what the tasks are about?

    detector's map ─ conv1x1 ─ FiLM by p ─ ReLU ─ pooled to a layer's size ─ conv1x1 (0) ─▶ delta,
    beta (B, C, h, w) for every layer

    The detector has already looked for the tasks at every position, so the encoder need not.
    `tasks=False` is the ablation: the same without p.
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

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """(B, K) task probabilities, or a multi-hot, and the detector's map (B, D, h, w)."""
        x = self.first(detected)
        if self.by_task is not None:
            told = self.by_task(probabilities)[:, :, None, None].float()
            delta, beta = told.chunk(2, dim=1)
            x = (1 + delta) * x + beta
        x = torch.relu(x)
        pooled = {step: avg_pool2d(x, step, ceil_mode=True) for step in set(self.steps)}
        modulation: Modulation = []
        for step, last in zip(self.steps, self.last, strict=True):
            delta, beta = last(pooled[step]).float().chunk(2, dim=1)
            modulation.append((1 + delta, beta))
        return modulation


def shares_of(level: Tensor, num_rates: int) -> Tensor | None:
    """How much of each trained rate is in levels (B,): (B, L) float32, one or two above 0.

    None for a model of one rate.
    """
    if num_rates == 1:
        return None
    places = torch.arange(num_rates, device=level.device)
    return (1 - (level[:, None] / BETWEEN - places).abs()).clamp_min(0.0).float()


class LevelModulation(nn.Module):
    """FiLM by the rate level: a scale and a shift of each channel, the identity at init.

    A level between two trained rates has a mixture of theirs.
    """

    def __init__(self, num_rates: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [c for own in channels for c in (own, own)]
        self.values = nn.Parameter(torch.zeros(num_rates, sum(self.sizes)))

    def forward(self, shares: Tensor) -> Modulation:
        """Shares of the rates (B, L), as `shares_of` gives them."""
        mixed = (shares[:, :, None] * self.values).sum(dim=1)[:, :, None, None]
        parts = torch.split(mixed, self.sizes, dim=1)
        return [(1 + delta, beta) for delta, beta in zip(parts[::2], parts[1::2], strict=True)]


def one_after_another(first: Modulation, second: Modulation) -> Modulation:
    """The modulation of each layer by `first` and then by `second`."""
    both: Modulation = []
    for before, after in zip(first, second, strict=True):
        if before is None or after is None:
            both.append(before or after)
            continue
        gamma, beta = after
        both.append((gamma * before[0], gamma * before[1] + beta))
    return both


class ChannelSets(nn.Module):
    """A set of latent channels for each task: the others are 0, and cost next to nothing.

    gate = 1 - prod over the tasks (1 - p_k / max p * open_kc), with open_kc = 1 where the parameter
    is not below 0: the union of the sets of all tasks that are asked for. All channels are open at
    init, and about 0.3 / learning rate steps from closed. The gradient passes to the sigmoid
    (straight-through), so that the rate can close a channel, and a loss can open it again.
    """

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.layers = len(layers.channels)
        self.open = nn.Parameter(torch.full((num_tasks, layers.channels[-1]), _OPEN))

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """(B, K) task probabilities, or a multi-hot, to a gate at the latent, (B, C, 1, 1)."""
        soft = torch.sigmoid(_GATE_SCALE * self.open)
        gates = soft + ((self.open >= 0).float() - soft).detach()
        p = probabilities.float()
        relative = p / p.amax(dim=1, keepdim=True).clamp_min(_LEAST)
        closed = 1 - relative[:, :, None] * gates
        gamma = (1 - closed.prod(dim=1))[:, :, None, None]
        return [*([None] * (self.layers - 1)), (gamma, torch.zeros_like(gamma))]


class GatedConditioning(nn.Module):
    """FiLM at every layer of the encoder, and a set of latent channels for each task."""

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.film = FiLMConditioning(num_tasks, layers, hidden=hidden)
        self.sets = ChannelSets(num_tasks, layers, hidden=hidden)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """(B, K) task probabilities, or a multi-hot; the map (B, D, h, w) is ignored."""
        return one_after_another(
            self.film(probabilities, detected), self.sets(probabilities, detected)
        )


class NoConditioning(nn.Module):
    """The ablation: nothing tells the encoder about tasks."""

    def __init__(self, num_tasks: int, layers: Layers, *, hidden: int) -> None:
        super().__init__()
        self.layers = len(layers.channels)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """Ignores both; every layer stays as it is."""
        return [None] * self.layers


CONDITIONING: dict[str, Callable[..., nn.Module]] = {
    "film": FiLMConditioning,
    "attention": AttentionConditioning,
    "features": partial(AttentionConditioning, tasks=False),
    "channels": ChannelSets,
    "gated": GatedConditioning,
    "none": NoConditioning,
}

READ_BY_TASK: dict[str, tuple[tuple[str, int], ...]] = {
    "film": (("film.first.weight", 1),),
    "attention": (("by_task.weight", 1),),
    "features": (),
    "channels": (("open", 0),),
    "gated": (("film.film.first.weight", 1), ("sets.open", 0)),
    "none": (),
}
"""The parameters of each kind that hold a row for each task, and the dimension of the tasks."""
