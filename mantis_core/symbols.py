"""The symbols of a latent: their range, and the context of each by its neighbours already decoded.

Density and coder both read this. Only integers, so that both ends agree on every machine.

A latent (C, h, w) is coded in three passes: the positions with even row and column; those with odd
row and column; the rest. Pass 1 looks at the four diagonal neighbours of a position, pass 2 at the
four beside, above and below it. All of them are decoded by then. Each neighbour counts from -REACH
to REACH, and as 0 outside the latent. Their sum, from -MOST to MOST, is the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Prior: TypeAlias = Literal["shared", "per_task", "primary", "request"]
"""What codes an image: one density for all, the mean of its tasks', its most probable task's, or
one for each task alone and one for several."""

MAX_SYMBOL = (1 << 20) - 1
"""The largest symbol; its negative is the smallest."""

REACH = 2
MOST = 3
SUMS = 2 * MOST + 1
CONTEXTS = 1 + 2 * SUMS
"""Tables of a channel: one for pass 0, then one a sum for pass 1, then one a sum for pass 2."""


def prior_rows(prior: Prior, num_tasks: int) -> int:
    """The number of densities of each channel."""
    if prior == "shared":
        return 1
    return num_tasks + 1 if prior == "request" else num_tasks


@lru_cache(maxsize=64)
def pass_of(height: int, width: int) -> NDArray[np.int64]:
    """The pass of each position, (h, w)."""
    rows, columns = np.indices((height, width)) % 2
    return np.where(rows != columns, 2, rows)


def neighbour_sums(padded: Any, number: int) -> Any:
    """The sum of each position's neighbours, (..., h, w), in pass `number` (1 or 2).

    `padded` (..., h + 2, w + 2) holds integers between -REACH and REACH with a frame of zeros.
    """
    above, here, below = padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :]
    if number == 1:
        total = above[..., :-2] + above[..., 2:] + below[..., :-2] + below[..., 2:]
    else:
        total = above[..., 1:-1] + below[..., 1:-1] + here[..., :-2] + here[..., 2:]
    return total.clip(-MOST, MOST)


def first_context(number: int) -> int:
    """The context of the lowest sum in a pass."""
    return 0 if number == 0 else 1 + SUMS * (number - 1)


def passes(tables: int) -> Sequence[int | None]:
    """The passes a map is coded in, by the number of a channel's tables; None is all at once."""
    return (None,) if tables == 1 else (0, 1, 2)


def coding_order(
    entries: NDArray[np.int32],
    offsets: NDArray[np.int32],
    shape: tuple[int, ...],
    number: int | None,
) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """Where the symbols of a pass lie in the flat latent, in coding order, and their runs.

    A run is a row of the tables (C * X of them) with its first and last position (exclusive) in
    that order. `shape` is (C, h, w). `offsets` (C,) are the first symbols of the tables. `entries`
    (C, h * w) are indices into the tables; only those of earlier passes are read.
    """
    channels, height, width = shape
    of_channel = np.arange(channels)[:, None]
    positions = _positions(height, width, number)
    where = (of_channel * (height * width) + positions).reshape(-1)
    if not number:
        count, step = len(positions), 1 if number is None else CONTEXTS
        return where, [(c * step, c * count, (c + 1) * count) for c in range(channels)]
    padded = np.zeros((channels, height + 2, width + 2), np.int8)
    symbols = (entries + offsets[:, None]).clip(-REACH, REACH)
    padded[:, 1:-1, 1:-1] = symbols.reshape(shape)
    sums = neighbour_sums(padded, number).reshape(channels, -1)[:, positions] + MOST
    # Of 16 bits numpy sorts by radix, which is several times as fast.
    groups = (SUMS * of_channel + sums).astype(np.min_scalar_type(SUMS * channels)).reshape(-1)
    counts = np.bincount(groups)
    present = np.flatnonzero(counts)
    ends = counts[present].cumsum()
    rows = present // SUMS * CONTEXTS + first_context(number) + present % SUMS
    runs = zip(rows.tolist(), (ends - counts[present]).tolist(), ends.tolist(), strict=True)
    return where[np.argsort(groups, kind="stable")], list(runs)


@lru_cache(maxsize=64)
def _positions(height: int, width: int, number: int | None) -> NDArray[np.int64]:
    """Positions of one pass, or of all, in a flat map, row by row."""
    of_pass = pass_of(height, width).reshape(-1)
    return np.arange(len(of_pass)) if number is None else np.flatnonzero(of_pass == number)
