"""From a trained density to the integer tables that streams are coded by. Codes nothing itself.

Shapes: C channels of the latent, R prior rows (1 if shared, else K), X contexts of a channel,
E edges between symbols, L entries of the longest table.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.networks.bottleneck import Bottleneck

# A table ends where less than this is left on a side, and at +-_WIDEST: the escape takes over.
_TAIL_MASS = 2.0**-17
_WIDEST = 1024


def update_tables(bottleneck: Bottleneck) -> None:
    """Makes the integer tables from the density as it is, on the CPU; call it after training.

    The tables of a channel share one range of symbols, at most +-1024. In each row at most 2**-17
    of the mass lies below that range, and as much above it; the escape entry takes what is
    outside. Each table holds counts of at least 1 that sum to 2**16. Raises ValueError if the
    weights are not finite.
    """
    edges = torch.arange(-_WIDEST, _WIDEST + 2, dtype=torch.float64) - 0.5
    cumulative = bottleneck.cumulative(edges).numpy()  # (R, C, X, E)
    if not np.isfinite(cumulative).all():
        raise ValueError("the bottleneck's weights are not finite: no tables can be made")
    # (C,): symbol s lies between edges s and s + 1; keep those with mass beyond them.
    first = (cumulative[..., 1:] <= _TAIL_MASS).sum(-1).clip(max=2 * _WIDEST).min((0, 2))
    last = (2 * _WIDEST - (1 - cumulative[..., :-1] <= _TAIL_MASS).sum(-1)).clip(min=0)
    lengths = last.max((0, 2)) - first + 2
    shape = (*cumulative.shape[:3], lengths.max() + 1)
    cdf = np.full(shape, TOTAL, np.int32)
    for row, channel, context in np.ndindex(shape[:3]):
        start, stop = first[channel], first[channel] + lengths[channel]
        mass = np.diff(cumulative[row, channel, context, start:stop])
        counts = _integer_counts(np.append(mass, max(0.0, 1 - mass.sum())))
        cdf[row, channel, context, 0] = 0
        cdf[row, channel, context, 1 : len(counts) + 1] = np.cumsum(counts)
    made = (cdf.reshape(shape[0], -1, shape[3]), first - _WIDEST, lengths)
    bottleneck.keep_tables(*(torch.from_numpy(table.astype(np.int32)) for table in made))


def table_set(bottleneck: Bottleneck) -> TableSet:
    """A copy of the tables that `bottleneck` keeps; RuntimeError if `update_tables` never ran."""
    if not bottleneck.tables_ready:
        raise RuntimeError("the bottleneck has no tables: call update_tables() after training")
    kept = (bottleneck.table_cdf, bottleneck.table_offsets, bottleneck.table_lengths)
    cdf, offsets, lengths = (table.cpu().numpy().copy() for table in kept)
    return TableSet(bottleneck.prior, cdf, offsets, lengths)


def _integer_counts(mass: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts of at least 1 that sum to TOTAL, proportional to mass (n,) by largest remainders.

    Entries too rare for a count get 1, the others share what is left.
    """
    rare = np.zeros(len(mass), bool)
    while True:
        share = mass * ((TOTAL - rare.sum()) / mass[~rare].sum())
        newly_rare = ~rare & (share < 1)
        if not newly_rare.any():
            break
        rare |= newly_rare
    counts = np.where(rare, 1, np.floor(share)).astype(np.int64)
    remainders = np.where(rare, -1.0, share - np.floor(share))
    counts[np.argsort(-remainders, kind="stable")[: TOTAL - counts.sum()]] += 1
    return counts
