"""The rate levels of a model that codes at several rates.

A model is trained for L rate weights, in ascending order. Between two of them lie `BETWEEN - 1`
more levels, so that it has G = (L - 1) BETWEEN + 1 of them. Level 0 gives the largest streams and
the best answers. What belongs to a level in between is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BETWEEN = 4
"""Steps from one trained rate to the next."""


def count_levels(num_rates: int) -> int:
    """G, the number of levels of a model that is trained for `num_rates` weights."""
    return max(1, (num_rates - 1) * BETWEEN + 1)


def levels_of(rates: Sequence[float]) -> list[int]:
    """The level of each trained rate weight."""
    return [place * BETWEEN for place in range(len(rates))]


def weight_at(rates: Sequence[float], level: float) -> float:
    """The rate weight of a level, on a straight line between logarithms."""
    place = min(max(level / BETWEEN, 0.0), len(rates) - 1.0)
    low = min(math.floor(place), len(rates) - 2)
    share = place - low
    return math.exp((1 - share) * math.log(rates[low]) + share * math.log(rates[low + 1]))
