"""Integer counts of tables: from probabilities, and as a model folder holds them, deflated.

R prior rows, C channels, X contexts of a channel, L table entries of the longest channel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.byte_planes import deflate_planes, inflate_planes
from mantis_core.bitstream.coder import TOTAL, Ints

_SHORTEST = 2


def pack_counts(cdf: Ints, lengths: Ints) -> NDArray[np.uint8]:
    """Packs the tables `cdf` (R, C * X, L + 1) with `lengths` (C,) into bytes.

    These hold all counts, channel by channel, row by row, context by context. A count is below
    2**16, since the others are at least 1.
    """
    rows, channels = len(cdf), len(lengths)
    counts = np.diff(cdf).reshape(rows, channels, -1, cdf.shape[2] - 1)
    used = [counts[:, c, :, :length].ravel() for c, length in enumerate(lengths.tolist())]
    return deflate_planes(np.concatenate(used).astype(np.uint16))


def unpack_counts(packed: NDArray[np.uint8], lengths: Ints, rows: int, contexts: int) -> Ints:
    """Returns the `cdf` (R, C * X, L + 1) that was packed, from the same lengths, R and X.

    Raises ValueError if the bytes are not the counts of such tables.
    """
    if not lengths.size or not _SHORTEST <= lengths.min() <= lengths.max() <= TOTAL:
        raise ValueError(f"tables have lengths that are not {_SHORTEST} to {TOTAL}")
    tables = rows * contexts
    counts = inflate_planes(packed, tables * int(lengths.sum(dtype=np.int64)), "tables")
    cdf = np.full((tables, lengths.size, int(lengths.max()) + 1), TOTAL, np.int32)
    cdf[..., 0] = 0
    ends = tables * lengths.cumsum(dtype=np.int64)
    for channel, own in enumerate(np.split(counts, ends[:-1])):
        own = own.reshape(tables, -1)
        np.cumsum(own, axis=1, dtype=np.int32, out=cdf[:, channel, 1 : own.shape[1] + 1])
    of_rows = cdf.reshape(rows, contexts, lengths.size, -1).swapaxes(1, 2)
    return np.ascontiguousarray(of_rows).reshape(rows, -1, cdf.shape[-1])


def integer_counts(mass: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts of at least 1, for each table of mass (N, L) in the same proportions.

    The counts of a table sum to TOTAL, by largest remainders. Entries too rare for a count get 1,
    the others share what is left.
    """
    rare = np.zeros(mass.shape, bool)
    while True:
        common = [one[~skipped].sum() for one, skipped in zip(mass, rare, strict=True)]
        share = mass * ((TOTAL - rare.sum(1)) / common)[:, None]
        newly_rare = ~rare & (share < 1)
        if not newly_rare.any():
            break
        rare |= newly_rare
    counts = np.where(rare, 1, np.floor(share)).astype(np.int64)
    remainders = np.where(rare, -1.0, share - np.floor(share))
    largest = np.argsort(-remainders, axis=1, kind="stable")
    rank = np.argsort(largest, axis=1)
    counts += rank < TOTAL - counts.sum(1, keepdims=True)
    return counts
