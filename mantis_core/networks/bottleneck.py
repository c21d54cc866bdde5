"""The bottleneck: rounding or noise, the learned density, and the rate. Codes nothing.

It keeps the integer tables among its buffers; `codec/tables.py` makes them of its density.

Shapes: B batch, C h w of the latent, K tasks, R prior rows (1 if shared, else K), X contexts of a
channel (1, or those of `symbols.py`), N values.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.ops import LowerBound
from torch import Tensor, nn
from torch.nn import functional

from mantis_core.bitstream.packed_tables import unpack_counts
from mantis_core.networks.blocks import without_autocast
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, REACH, Prior, contexts, pass_of

Quantizer: TypeAlias = Literal["noise", "ste"]

_LIKELIHOOD_BOUND = 1e-9
# CompressAI starts densities at scale 10; latents start below 1, and short trainings pay for it.
_START_SCALE = 3.0
_TABLES = ("table_cdf", "table_offsets", "table_lengths")
_PACKED = "table_counts"  # in a folder, in the place of table_cdf


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
    task; `per_task` the mean of its active tasks' likelihoods. `quantizer` says what decoders are
    trained on: `ste` the rounded latent, its gradient passed through; `noise` the same noisy latent
    as the rate.

    With `neighbour_contexts` a symbol's density is its channel's, shifted and stretched by the
    context that its neighbours give, in training as in the tables:
    P(y) = F(s (y + 1/2 - m)) - F(s (y - 1/2 - m)), m and s of the channel and context.
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
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_tasks = num_tasks
        self.prior: Prior = prior
        self.quantizer: Quantizer = quantizer
        self.num_rows = 1 if prior == "shared" else num_tasks
        self.density = EntropyBottleneck(self.channels * self.num_rows, init_scale=_START_SCALE)
        self.density.quantiles.requires_grad_(False)  # medians stay 0, tails are searched
        self.context_shift: nn.Parameter | None = None
        self.context_log_scale: nn.Parameter | None = None
        if neighbour_contexts:
            self.context_shift = nn.Parameter(torch.zeros(self.channels, CONTEXTS))
            self.context_log_scale = nn.Parameter(torch.zeros(self.channels, CONTEXTS))
        self.likelihood_bound = LowerBound(_LIKELIHOOD_BOUND)
        for name in _TABLES:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32))

    def forward(self, latent: Tensor, mask: Tensor, primary: Tensor) -> BottleneckOutput:
        """Quantises a latent (B, C, h, w) and estimates its size; float32, under autocast too.

        `mask` (B, K) bool are the active tasks, `primary` (B,) int64 the most probable of them;
        each is read only by the prior that needs it. ValueError if an image has no row. In training
        mode every parameter gets a gradient (zero for the rows of tasks that are absent).
        """
        with without_autocast(latent):
            y = latent.float()
            if self.training:
                noisy = y + torch.rand_like(y) - 0.5
                y_hat = noisy if self.quantizer == "noise" else y + (y.round() - y).detach()
            else:
                noisy = y_hat = y.round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
            noisy, half = self._by_context(noisy, y)
            likelihood = self._likelihood(noisy, half, mask, primary)
            bits = -self.likelihood_bound(likelihood).log2().flatten(1).sum(1)
        return BottleneckOutput(y_hat, bits)

    @property
    def num_contexts(self) -> int:
        """X."""
        return 1 if self.context_shift is None else CONTEXTS

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

        `values` broadcast to (R, c, X, N), the shape of the result.
        """
        if self.context_shift is not None and self.context_log_scale is not None:
            shift, log_scale = self.context_shift[channels], self.context_log_scale[channels]
            scale = log_scale.double().cpu().exp()[..., None]
            values = (values - shift.double().cpu()[..., None]) * scale
        weights = [
            [t.view(self.num_rows, -1, *t.shape[1:])[:, channels].flatten(0, 1) for t in tensors]
            for tensors in _weights(copy.deepcopy(self.density).cpu().double())
        ]
        count = len(range(self.channels)[channels])
        values = values.expand(self.num_rows, count, self.num_contexts, values.shape[-1])
        logits = _cumulative_logits(values.flatten(0, 1).flatten(1)[:, None], *weights)
        return torch.sigmoid(logits).view(values.shape)

    def _by_context(self, values: Tensor, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the channel's density is asked for `values`, and half the width of a symbol there.

        The contexts are those of the rounded `latent`; both are (B, C, h, w). A half width of None
        stands for 1/2.
        """
        if self.context_shift is None or self.context_log_scale is None:
            return values, None
        symbols = latent.detach().round().clamp(-REACH, REACH)
        padded = functional.pad(symbols, (1, 1, 1, 1)).to(torch.int64)
        passes = torch.from_numpy(pass_of(*values.shape[2:])).to(values.device)
        own = CONTEXTS * torch.arange(values.shape[1], device=values.device)[:, None, None]
        index = contexts(padded, passes) + own
        weights = torch.stack(
            [self.context_shift.flatten(), self.context_log_scale.flatten()], dim=1
        )
        shift, log_scale = functional.embedding(index, weights).unbind(-1)
        scale = log_scale.exp()
        return (values - shift) * scale, 0.5 * scale

    def _likelihood(
        self, values: Tensor, half: Tensor | None, mask: Tensor, primary: Tensor
    ) -> Tensor:
        """P(value) of each element of values (B, C, h, w), mixed over the image's rows.

        `half` is as `_by_context` gives it. Each pair of row and image that occurs is evaluated
        once, row by row.
        """
        rows, images, rows_per_image = self._pairs(values, mask, primary)
        weights = [
            [t.view(self.num_rows, self.channels, *t.shape[1:]).unbind(0) for t in tensors]
            for tensors in _weights(self.density)
        ]

        def by_row(x: Tensor) -> tuple[Tensor, ...]:  # (C, pairs, h * w) of each row
            gathered = x.flatten(2).index_select(0, images).transpose(0, 1)
            return torch.split(gathered, rows, dim=1)

        halves = [None] * len(rows) if half is None else by_row(half)
        parts = []
        for row, (part, width) in enumerate(zip(by_row(values), halves, strict=True)):
            if part.shape[1]:
                of_row = [[t[row] for t in tensors] for tensors in weights]
                flat = part.reshape(len(part), 1, -1)
                own = 0.5 if width is None else width.reshape(len(part), 1, -1)
                parts.append(_interval_mass(flat, own, *of_row).view_as(part))
        pairs = torch.cat(parts, dim=1).transpose(0, 1)
        mixed = torch.zeros_like(values).flatten(2).index_add(0, images, pairs)
        return (mixed / rows_per_image[:, None, None]).view_as(values)

    def _pairs(
        self, values: Tensor, mask: Tensor, primary: Tensor
    ) -> tuple[list[int], Tensor, Tensor]:
        """How many images use each row (R), those images row after row, and rows per image (B,).

        Counted on the CPU, so that a GPU waits once and not for every row.
        """
        if self.prior == "shared":
            uses = torch.ones(len(values), 1, dtype=torch.bool)
        elif self.prior == "primary":
            uses = functional.one_hot(primary.cpu(), self.num_tasks).bool()
        else:
            uses = mask.cpu()
        per_image = uses.sum(1)
        if not per_image.all():
            raise ValueError("an image has no active task: the mask must never be empty")
        images = uses.T.nonzero()[:, 1]
        on = values.device
        return uses.sum(0).tolist(), images.to(on), per_image.to(on)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes tables of any length, packed or not: those given replace those here.

        Raises ValueError for packed tables that are not of this bottleneck.
        """
        packed, lengths = state_dict.pop(prefix + _PACKED, None), prefix + "table_lengths"
        if packed is not None:
            found = unpack_counts(
                packed.cpu().numpy(),
                state_dict[lengths].cpu().numpy(),
                self.num_rows,
                self.num_contexts,
            )
            state_dict[prefix + "table_cdf"] = torch.from_numpy(found)
        for name in _TABLES:
            if prefix + name in state_dict:
                here = getattr(self, name)
                setattr(self, name, here.new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _weights(density: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The density's matrices, biases and factors as applied: constrained to be monotone."""
    return (
        [functional.softplus(matrix) for matrix in density.matrices],
        list(density.biases),
        [torch.tanh(factor) for factor in density.factors],
    )


def _cumulative_logits(
    values: Tensor, matrices: list[Tensor], biases: list[Tensor], factors: list[Tensor]
) -> Tensor:
    """Logit of the cumulative density at values (channels, 1, N), as CompressAI defines it."""
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        values = matrix @ values + bias
        if i < len(factors):
            values = values + factors[i] * torch.tanh(values)
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
    lower = _cumulative_logits(values - half, matrices, biases, factors)
    upper = _cumulative_logits(values + half, matrices, biases, factors)
    sign = torch.where(lower + upper > 0, -1.0, 1.0).detach()
    return (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
