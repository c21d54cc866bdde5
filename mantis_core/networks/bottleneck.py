"""The bottleneck: rounding or noise, the learned density, and the rate. Codes nothing.

It keeps the integer tables among its buffers; `codec/tables.py` makes them of its density.

Shapes: B batch, C h w of the latent, K tasks, R prior rows (1 if shared, K + 1 for requests, else
K), X contexts of a channel (1, or those of `symbols.py`), L rates and G levels (1 each, or those of
`rates.py`), N values.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.ops import LowerBound
from torch import Tensor, nn
from torch.nn import functional

from mantis_core.config import Quantizer
from mantis_core.networks.blocks import without_autocast
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.stacked import end_to_end
from mantis_core.rates import count_levels
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, MOST, REACH, Prior, first_context, prior_rows

_LIKELIHOOD_BOUND = 1e-9
# CompressAI starts densities at scale 10; latents start below 1, and short trainings pay for it.
_START_SCALE = 3.0
_JITTER = 0.2  # each way
_SHARPNESS = 5.0  # of soft rounding
_TABLES = ("table_cdf", "table_offsets", "table_lengths")


class BottleneckOutput(NamedTuple):
    """What decoders get, `y_hat`, and each image's payload, `bits` (B,): float32."""

    y_hat: Tensor
    bits: Tensor


class Bottleneck(nn.Module):
    """Factorised entropy bottleneck with one density per channel and prior row.

        y ─┬─ + U(-1/2, 1/2) ─▶ density[row] ─▶ bits        training
           └─ round (straight-through) ─▶ y_hat
        y ─── round ─▶ y_hat ─▶ density[row] ─▶ bits        evaluation

    Balle et al., "Variational image compression with a scale hyperprior" (ICLR 2018), appendix 6.1;
    parameters and their start are those of CompressAI's EntropyBottleneck with C * R channels, row
    after row. Medians are fixed at 0: symbols are plain rounded values.

    `prior` says which row an image uses: `shared` the only one; `primary` that of its most probable
    task; `per_task` the mean of its active tasks' likelihoods; `request` that of its only active
    task, or the last one where several are active. `quantizer` says what decoders are
    trained on: `ste` the rounded latent, its gradient passed through; `noise` the same noisy latent
    as the rate; with `rounded` the rate too is of the rounded latent; with `jitter` the latent is
    moved by up to 0.2 before it is rounded, the rate is of the noisy one. A symbol near its
    threshold then flips from step to step, and training moves it away. With `soft` the noise of the
    rate is added to the softly rounded latent: no rate pulls a symbol down but near its threshold,
    where it is sent or not.

    With `neighbour_contexts` a symbol's density is its channel's, shifted and stretched by the
    context that its neighbours give, in training as in the tables:
    P(y) = F(s (y + 1/2 - m)) - F(s (y - 1/2 - m)), m and s of the channel and context.

    A model of L > 1 rates has such a shift and stretch for each of them too, with contexts or
    without; the density's weights are the same at all rates. Levels between two rates have a
    mixture of theirs (`rates.py`).

    `most_active` is the largest number of active tasks that masks have in training. Only `per_task`
    reads it; None if it is not known.
    """

    table_cdf: Tensor
    table_offsets: Tensor
    table_lengths: Tensor

    def __init__(
        self,
        channels: int,
        num_tasks: int,
        prior: Prior,
        quantizer: Quantizer = "ste",
        *,
        neighbour_contexts: bool = False,
        num_rates: int = 1,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_rates = num_rates
        self.num_tasks = num_tasks
        self.prior: Prior = prior
        self.quantizer: Quantizer = quantizer
        self.num_rows = prior_rows(prior, num_tasks)
        self.most_active: int | None = None
        self.density = EntropyBottleneck(self.channels * self.num_rows, init_scale=_START_SCALE)
        self.density.quantiles.requires_grad_(False)  # medians stay 0, tails are searched
        self.num_contexts = CONTEXTS if neighbour_contexts else 1
        self.context_shift: nn.Parameter | None = None
        self.context_log_scale: nn.Parameter | None = None
        if neighbour_contexts or num_rates > 1:
            of_rates = (num_rates,) if num_rates > 1 else ()
            shape = (*of_rates, self.channels, self.num_contexts)
            self.context_shift = nn.Parameter(torch.zeros(shape))
            self.context_log_scale = nn.Parameter(torch.zeros(shape))
        self.likelihood_bound = LowerBound(_LIKELIHOOD_BOUND)
        for name in _TABLES:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32))

    def forward(
        self, latent: Tensor, mask: Tensor, primary: Tensor, shares: Tensor | None = None
    ) -> BottleneckOutput:
        """Quantises a latent (B, C, h, w) and estimates its size; float32, under autocast too.

        `mask` (B, K) bool are the active tasks, `primary` (B,) int64 the most probable of them;
        each is read only by the prior that needs it. `shares` (B, L) are those of the rates, for a
        bottleneck of several. ValueError if an image has no row, unless
        `most_active` is set: then its bits are nan. In training mode every parameter gets a
        gradient (zero for the rows of tasks that are absent).
        """
        with without_autocast(latent):
            y = latent.float()
            if self.training:
                y_hat, noisy = self._in_training(y)
            else:
                noisy = y_hat = y.round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
            noisy, half = self._by_context(noisy, y, shares)
            likelihood = self._likelihood(noisy, half, mask, primary)
            bits = -self.likelihood_bound(likelihood).log2().flatten(1).sum(1)
        return BottleneckOutput(y_hat, bits)

    def _in_training(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What decoders get of a latent in training, and what the rate is estimated of."""
        near = y
        if self.quantizer == "jitter":
            near = y + (2 * _JITTER) * (torch.rand_like(y) - 0.5)
        rounded = y + (near.round() - y).detach()
        if self.quantizer == "rounded":
            return rounded, rounded
        smooth = soft_round(y) if self.quantizer == "soft" else y
        noisy = smooth + torch.rand_like(y) - 0.5
        return noisy if self.quantizer == "noise" else rounded, noisy

    @property
    def num_levels(self) -> int:
        """G, see `rates.py`."""
        return count_levels(self.num_rates)

    @property
    def tables_ready(self) -> bool:
        """Whether integer tables are kept, made here or read from a checkpoint."""
        return self.table_cdf.numel() > 0

    def keep_tables(self, cdf: Tensor, offsets: Tensor, lengths: Tensor) -> None:
        """Keeps int32 tables as buffers, so that they are saved beside the weights."""
        device = self.table_cdf.device
        for name, table in zip(_TABLES, (cdf, offsets, lengths), strict=True):
            setattr(self, name, table.to(device))

    @torch.no_grad()
    def cumulative(self, values: Tensor, channels: slice = slice(None)) -> Tensor:
        """The cumulative density of `channels`, c of them, at float64 `values`, on the CPU.

        `values` broadcast to (G * R, c, X, N), the shape of the result: level after level.
        """
        count = len(range(self.channels)[channels])
        shape = (self.num_levels * self.num_rows, count, self.num_contexts, values.shape[-1])
        values = values.expand(shape)
        if self.context_shift is not None and self.context_log_scale is not None:
            shares = shares_of(torch.arange(self.num_levels), self.num_rates)
            known = torch.ones(1, 1) if shares is None else shares
            shift, log_scale = (
                (known.double() @ own.detach().double().cpu().view(self.num_rates, -1)).view(
                    -1, 1, self.channels, self.num_contexts
                )[:, :, channels, :, None]
                for own in (self.context_shift, self.context_log_scale)
            )
            by_level = values.reshape(self.num_levels, self.num_rows, *shape[1:])
            values = ((by_level - shift) * log_scale.exp()).reshape(shape)
        weights = [
            [t.view(self.num_rows, -1, *t.shape[1:])[:, channels].flatten(0, 1) for t in tensors]
            for tensors in _weights(copy.deepcopy(self.density).cpu().double())
        ]
        # Rows of all levels side by side: they have the same weights.
        side_by_side = values.reshape(self.num_levels, self.num_rows * count, -1).transpose(0, 1)
        logits = _cumulative_logits(side_by_side.flatten(1)[:, None], *weights)
        by_row = logits.view(self.num_rows * count, self.num_levels, -1).transpose(0, 1)
        return torch.sigmoid(by_row).reshape(shape)

    def _by_context(
        self, values: Tensor, latent: Tensor, shares: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Where the channel's density is asked for `values`, and half the width of a symbol there.

        The contexts are those of the rounded `latent`; both are (B, C, h, w). A half width of None
        stands for 1/2.
        """
        if self.context_shift is None or self.context_log_scale is None:
            return values, None
        pair = self.context_shift.view(-1, 1), self.context_log_scale.view(-1, 1)
        known = end_to_end(pair, 1)  # (L * C * X, 2)
        places = self.channels * self.num_contexts
        if self.num_rates > 1:
            assert shares is not None
            of_rates = known.view(1, self.num_rates, -1)
            known = (shares[:, :, None] * of_rates).sum(dim=1).view(-1, 2)  # (B * C * X, 2)
        if self.num_contexts == 1:
            shift, log_scale = known.view(-1, self.channels, 1, 1, 2).unbind(-1)
        else:
            rows = _context_rows(latent.detach())
            if self.num_rates > 1:
                images = torch.arange(len(latent), device=latent.device)
                rows = rows + places * images[:, None, None, None]
            shift, log_scale = functional.embedding(rows, known).unbind(-1)
        scale = log_scale.exp()
        return (values - shift) * scale, (0.5 * scale).expand_as(values)

    def _likelihood(
        self, values: Tensor, half: Tensor | None, mask: Tensor, primary: Tensor
    ) -> Tensor:
        """P(value) of each element of values (B, C, h, w), mixed over the image's rows.

        `half` is as `_by_context` gives it. All pairs of image and row are evaluated at once, so
        the number of kernels does not grow with rows.
        """
        if self.prior == "shared":

            def of_channel(x: Tensor) -> Tensor:  # (C, 1, B * h * w)
                return x.transpose(0, 1).reshape(self.channels, 1, -1)

            own = 0.5 if half is None else of_channel(half)
            mass = _interval_mass(of_channel(values), own, *_weights(self.density))
            return mass.view(self.channels, len(values), *values.shape[2:]).transpose(0, 1)
        rows, shares = self._rows(mask, primary)
        count = rows.shape[1]

        def of_pair(x: Tensor) -> Tensor:  # (B * M * C, 1, h * w)
            each = x if count == 1 else x.unsqueeze(1).expand(-1, count, -1, -1, -1)
            return each.reshape(-1, 1, x.shape[2] * x.shape[3])

        own = 0.5 if half is None else of_pair(half)
        mass = _interval_mass(of_pair(values), own, *self._weights_of(rows.flatten()))
        if shares is None:
            return mass.view(values.shape)
        mass = mass.view(len(values), count, *values.shape[1:])
        return (mass * shares[:, :, None, None, None]).sum(1)

    def _rows(self, mask: Tensor, primary: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which rows each image uses, (B, M) int64, and the share of each (B, M), None if M is 1.

        An image of fewer than M rows has others with a share of 0. M is `most_active` in training,
        if that is set. Else it is read from the mask, for which a GPU has to wait.
        """
        if self.prior == "primary":
            return primary[:, None], None
        if self.prior == "request":
            alone = mask.int().argmax(dim=1)
            return torch.where(mask.sum(dim=1) > 1, self.num_tasks, alone)[:, None], None
        per_image = mask.sum(1, keepdim=True)
        most = self.most_active if self.training else None
        if most is None:
            least, most = torch.stack(per_image.aminmax()).tolist()
            if least == 0:
                raise ValueError("an image has no active task: the mask must never be empty")
        found = mask.float().topk(min(most, self.num_tasks), dim=1)
        return found.indices, found.values / per_image

    def _weights_of(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The density's weights for `rows` (P,), each (P * C, ...) in place of (R * C, ...)."""
        density: Any = self.density
        layers = len(density.factors)
        # All layers but the last have as many outputs: their weights stand side by side.
        inner = [*density.matrices[:layers], *density.biases[:layers], *density.factors]
        inputs = [tensor.shape[2] for tensor in inner]
        sizes = [sum(inputs[:layers]), layers, layers]
        parts = [_as_applied(end_to_end(inner, 2), sizes)]
        parts.append(
            _as_applied(
                end_to_end([density.matrices[layers], density.biases[layers]], 2),
                [density.matrices[layers].shape[2], 1, 0],
            )
        )
        # An embedding's gradient is summed in one order; an index's, on a GPU, in any.
        picked, last = (
            functional.embedding(rows, part.view(self.num_rows, -1)).view(-1, *part.shape[1:])
            for part in parts
        )
        each = torch.split(picked, inputs, dim=2)
        matrix, bias = torch.split(last, [last.shape[2] - 1, 1], dim=2)
        biases = each[layers : 2 * layers]
        return [*each[:layers], matrix], [*biases, bias], list(each[2 * layers :])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes tables of any length: those given replace those here."""
        for name in _TABLES:
            if prefix + name in state_dict:
                here = getattr(self, name)
                setattr(self, name, here.new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def soft_round(y: Tensor) -> Tensor:
    """Rounding with a slope: steep at the thresholds, nearly flat around the integers.

    Agustsson and Theis, "Universally Quantized Neural Compression" (NeurIPS 2020), equation 12.
    """
    middle = y.floor() + 0.5
    return middle + 0.5 * torch.tanh(_SHARPNESS * (y - middle)) / math.tanh(0.5 * _SHARPNESS)


def _context_rows(latent: Tensor) -> Tensor:
    """The row of each position's context among those of all channels, int64 (B, C, h, w).

    As `symbols.py` defines it, of the rounded latent. Sums of so few small integers are exact.
    """
    channels, height, width = latent.shape[1:]
    compiling = torch.compiler.is_compiling()  # then the compiler keeps what is constant
    neighbours, chosen, lowest = (_context_map if compiling else _kept_context_map)(
        channels, height, width, latent.device
    )
    symbols = latent.round().clamp(-REACH, REACH).reshape(-1, 1, *latent.shape[2:])
    sums = functional.conv2d(symbols, neighbours, padding=1).clamp(-MOST, MOST)
    return (sums * chosen).sum(dim=1).view(latent.shape).add(lowest).long()


def _context_map(
    channels: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_context_rows` needs, float32, made on the device: a copy to it makes the CPU wait.

    A kernel for each of the passes 1 and 2 (2, 1, 3, 3), where it applies (2, h, w), and the row of
    the sum 0 (C, h, w).
    """
    odd = torch.arange(9, device=device) % 2
    kernels = torch.stack([1 - odd, odd])
    kernels[0, 4] = 0
    rows, columns = (torch.arange(side, device=device) % 2 for side in (height, width))
    last = rows[:, None] != columns
    chosen = torch.stack([rows[:, None] * columns, last]).float()
    base = chosen[0] * (first_context(1) + MOST) + chosen[1] * (first_context(2) + MOST)
    lowest = base + CONTEXTS * torch.arange(channels, device=device)[:, None, None]
    return kernels.view(2, 1, 3, 3).float(), chosen, lowest


_kept_context_map = lru_cache(maxsize=64)(_context_map)


def _weights(density: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The density's matrices, biases and factors as applied: constrained to be monotone."""
    return (
        [functional.softplus(matrix) for matrix in density.matrices],
        list(density.biases),
        [torch.tanh(factor) for factor in density.factors],
    )


def _as_applied(side_by_side: Tensor, sizes: list[int]) -> Tensor:
    """As `_weights`, of matrices, biases and factors that stand side by side, (..., sum of sizes).

    `sizes` are those of the three.
    """
    matrices, biases, factors = torch.split(side_by_side, sizes, dim=2)
    return torch.cat([functional.softplus(matrices), biases, torch.tanh(factors)], dim=2)


def _cumulative_logits(
    values: Tensor, matrices: list[Tensor], biases: list[Tensor], factors: list[Tensor]
) -> Tensor:
    """Logit of the cumulative density at values (channels, 1, N), as CompressAI defines it."""
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        values = torch.baddbmm(bias, matrix, values)
        if i < len(factors):
            values = torch.addcmul(values, factors[i], torch.tanh(values))
    return values


def _interval_mass(
    values: Tensor,
    half: Tensor | float,
    matrices: list[Tensor],
    biases: list[Tensor],
    factors: list[Tensor],
) -> Tensor:
    """Mass of [value - half, value + half].

    Computed in the left tail, for which an interval in the right tail is mirrored: near 1, float32
    cannot tell two sigmoids apart. CompressAI 1.2.8 does not mirror, and loses likelihood and
    gradient in the right tail.
    """
    both = torch.cat([values - half, values + half], dim=2)
    ends = _cumulative_logits(both, matrices, biases, factors).view(len(values), 2, -1)
    sign = (ends.sum(dim=1, keepdim=True) > 0).mul(-2.0).add(1.0)  # -1 where mirrored
    lower, upper = torch.sigmoid(sign * ends).unbind(1)
    return (upper - lower).abs()
