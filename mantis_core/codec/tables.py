"""From a trained density to the integer tables that streams are coded by. Codes nothing itself.

Shapes: C channels of the latent, G rate levels, R prior rows (1 if shared, K + 1 for requests, else
K), X contexts of a channel, E edges between symbols, L entries of the longest table.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.packed_tables import integer_counts
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
    first, last = _ranges(bottleneck)
    lengths = last - first + 2
    rows = bottleneck.num_levels * bottleneck.num_rows
    tables = rows, bottleneck.channels, bottleneck.num_contexts
    cdf = np.full((*tables, lengths.max() + 1), TOTAL, np.int32)
    for channel, (start, length) in enumerate(zip(first, lengths, strict=True)):
        edges = np.arange(start, start + length)
        own = _cumulative(bottleneck, edges, slice(channel, channel + 1))
        mass = np.diff(own.reshape(-1, length))
        outside = [max(0.0, 1 - one.sum()) for one in mass]
        counts = integer_counts(np.column_stack([mass, outside]))
        cdf[:, channel, :, 0] = 0
        cdf[:, channel, :, 1 : length + 1] = counts.cumsum(1).reshape(*tables[::2], length)
    made = (cdf.reshape(len(cdf), -1, cdf.shape[3]), first - _WIDEST, lengths)
    bottleneck.keep_tables(*(torch.from_numpy(table.astype(np.int32)) for table in made))


def table_set(bottleneck: Bottleneck) -> TableSet:
    """A copy of the tables that `bottleneck` keeps; RuntimeError if `update_tables` never ran."""
    if not bottleneck.tables_ready:
        raise RuntimeError("the bottleneck has no tables: call update_tables() after training")
    kept = (bottleneck.table_cdf, bottleneck.table_offsets, bottleneck.table_lengths)
    cdf, offsets, lengths = (table.cpu().numpy().copy() for table in kept)
    return TableSet(bottleneck.prior, cdf, offsets, lengths, levels=bottleneck.num_levels)


def _cumulative(
    bottleneck: Bottleneck, edges: NDArray[np.int64], channels: slice = slice(None)
) -> NDArray[np.float64]:
    """What `Bottleneck.cumulative` says of edges; edge 0 lies below the symbol -_WIDEST."""
    found = bottleneck.cumulative(torch.from_numpy(edges - (_WIDEST + 0.5)), channels).numpy()
    if not np.isfinite(found).all():
        raise ValueError("the bottleneck's weights are not finite: no tables can be made")
    return found


def _ranges(bottleneck: Bottleneck) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last symbol (C,) of each channel: those with mass beyond them in some table.

    Found by bisection, for the lower tail and for the upper one: the density only rises.
    """
    rows = bottleneck.num_levels * bottleneck.num_rows
    shape = (rows, bottleneck.channels, bottleneck.num_contexts)
    at_least, at_most = np.empty((2, 2, *shape), np.int64)
    at_least[0], at_least[1], at_most[:] = 1, 0, 2 * _WIDEST + 1
    at_most[0] += 1
    while (at_least < at_most).any():
        middle = (at_least + at_most) // 2
        below = _cumulative(bottleneck, np.moveaxis(middle, 0, -1))
        found = np.stack([below[..., 0] > _TAIL_MASS, 1 - below[..., 1] <= _TAIL_MASS])
        at_most = np.where(found, middle, at_most)
        at_least = np.where(found, at_least, np.minimum(middle + 1, at_most))
    first = (at_most[0] - 1).clip(max=2 * _WIDEST).min((0, 2))
    last = (at_most[1] - 1).clip(min=0).max((0, 2))
    return first, last
