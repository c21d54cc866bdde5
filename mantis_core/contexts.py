"""Which table of a channel a symbol of the map is coded with: by its neighbours already decoded.

A map (C, h, w) is coded in three passes: the positions with even row and column; those with odd row
and column; the rest. Pass 1 looks at a position's four diagonal neighbours and pass 2 at the four
beside, above and below it, all decoded by then: each counts from -2 to 2, 0 outside the map, and
their sum, from -3 to 3, is the context. Only integers, so that both ends agree on every machine.

Serves numpy arrays and torch tensors alike, shaped (..., h, w); coder.py and bottleneck.py use it.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

REACH = 2
MOST = 3
SUMS = 2 * MOST + 1
CONTEXTS = 1 + 2 * SUMS
"""Tables of a channel: one for pass 0, then one a sum for pass 1, then one a sum for pass 2."""
PASSES = 3


@lru_cache(maxsize=64)
def pass_of(height: int, width: int) -> NDArray[np.int64]:
    """The pass of each position, (h, w)."""
    rows, columns = np.indices((height, width)) % 2
    return np.where(rows != columns, 2, rows)


def neighbour_sums(padded: Any, number: int) -> Any:
    """The sum around each position, (..., h, w), that pass `number` (1 or 2) goes by.

    `padded` (..., h + 2, w + 2) are integers between -REACH and REACH with a frame of zeros.
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


def contexts(padded: Any, passes: Any) -> Any:
    """Context of each position, (..., h, w), where all symbols are known; `passes` (h, w)."""
    return sum(
        (passes == number) * (first_context(number) + MOST + neighbour_sums(padded, number))
        for number in (1, 2)
    )
