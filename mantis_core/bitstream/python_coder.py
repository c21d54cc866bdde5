"""A range coder in Python and numpy, to the byte that of constriction 0.5, for where that lacks.

It has the part of constriction's interface that this package uses, and no more. 32-bit words,
64-bit state, probabilities out of 2**24, as constriction's defaults (Bamler, arXiv 2201.01741): a
symbol of p / 2**24 behind a cumulative c takes the interval [low + s c, low + s (c + p)) with
s = width >> 24; once the width is under 2**32 the top word of `low` is given out. A carry then
runs through the words that were given out, which constriction holds back instead.

    from mantis_core.bitstream.python_coder import model, queue
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_PRECISION = 24
_WHOLE = 1 << _PRECISION
_WORD = 0xFFFFFFFF
_STATE = 0xFFFFFFFFFFFFFFFF
_NARROW = 1 << 32
_INVALID = "Tried to decode from compressed data that is invalid for the employed entropy model."

Values: TypeAlias = int | NDArray[np.int32]


class Uniform:
    """The numbers from 0 to `count` - 1, 2 to 2**24 of them; the last takes what is left over."""

    def __init__(self, count: int) -> None:
        if not 2 <= count <= _WHOLE:
            raise ValueError(f"{count} equal values: need 2 to {_WHOLE}")
        self._last, self._each = int(count) - 1, _WHOLE // int(count)

    def interval(self, value: int) -> tuple[int, int]:
        """Cumulative and width of a value, out of 2**24."""
        if not 0 <= value <= self._last:
            raise ValueError(f"{value} is not between 0 and {self._last}")
        start = value * self._each
        return start, self._each if value < self._last else _WHOLE - start

    def find(self, place: int) -> tuple[int, int, int]:
        """The value at `place` out of 2**24, its cumulative and its width."""
        value = min(place // self._each, self._last)
        return (value, *self.interval(value))


class Categorical:
    """Values by weights, see `coder.exact_model`; without weights each value comes with its own."""

    def __init__(
        self, probabilities: NDArray[np.float64] | None = None, *, perfect: bool = False
    ) -> None:
        if perfect:
            raise ValueError("perfect=True is not what streams are coded by")
        self._edges: list[int] | None = None
        if probabilities is not None:
            self._edges = _edges(probabilities[None])[0].tolist()

    def interval(self, value: int) -> tuple[int, int]:
        """Cumulative and width of a value, out of 2**24."""
        assert self._edges is not None
        if not 0 <= value < len(self._edges) - 1:
            raise ValueError(f"{value} is not between 0 and {len(self._edges) - 2}")
        start = self._edges[value]
        return start, self._edges[value + 1] - start

    def find(self, place: int) -> tuple[int, int, int]:
        """The value at `place` out of 2**24, its cumulative and its width."""
        assert self._edges is not None
        value = bisect_right(self._edges, place) - 1
        start = self._edges[value]
        return value, start, self._edges[value + 1] - start


class RangeEncoder:
    """Values to words, first in, first out."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._low, self._width = 0, _STATE

    def encode(self, values: Values, model: Any, weights: NDArray[Any] | None = None) -> None:
        """One value or several (N,) under a model, or under one each of `weights` (N, n)."""
        listed = [int(values)] if np.ndim(values) == 0 else np.asarray(values).tolist()
        intervals: Iterable[tuple[int, int]]
        if weights is None:
            intervals = map(model.interval, listed)
        else:
            edges, places = _edges(weights), np.arange(len(listed))
            starts = edges[places, listed]
            widths = edges[places, np.array(listed) + 1] - starts
            intervals = zip(starts.tolist(), widths.tolist(), strict=True)
        low, width = self._low, self._width
        for start, size in intervals:
            scale = width >> _PRECISION
            low += scale * start
            width = scale * size
            if low > _STATE:
                low &= _STATE
                self._carry()
            if width < _NARROW:
                self._words.append(low >> 32)
                low = (low & _WORD) << 32
                width <<= 32
        self._low, self._width = low, width

    def pos(self) -> tuple[int, tuple[int, int]]:
        """Words given out, and the state: the lower end and the width of the interval."""
        return len(self._words), (self._low, self._width)

    def get_compressed(self) -> NDArray[np.uint32]:
        """The words given out, and the two of the lower end."""
        return np.array([*self._words, self._low >> 32, self._low & _WORD], np.uint32)

    def _carry(self) -> None:
        place = len(self._words) - 1
        while self._words[place] == _WORD:
            self._words[place] = 0
            place -= 1
        self._words[place] += 1


class RangeDecoder:
    """Words back to values."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words: list[int] = words.tolist()
        self._next, self._width = 2, _STATE
        first, second = (*self._words, 0, 0)[:2]
        self._above = first << 32 | second  # of the number, above the interval's lower end

    def decode(self, model: Any, count: int | None = None) -> Any:
        """One value under a model, or `count` of them as int32 (count,).

        AssertionError, as constriction has it, for a number that no encoder makes.
        """
        found = [self._one(model) for _ in range(1 if count is None else count)]
        return found[0] if count is None else np.array(found, np.int32)

    def _one(self, model: Any) -> int:
        scale = self._width >> _PRECISION
        place = self._above // scale
        if place >= _WHOLE:
            raise AssertionError(_INVALID)
        value: int
        value, start, size = model.find(place)
        self._above -= scale * start
        self._width = scale * size
        if self._width < _NARROW:
            word = self._words[self._next] if self._next < len(self._words) else 0
            self._next += 1
            self._above = self._above << 32 | word
            self._width <<= 32
        return value


def _edges(weights: NDArray[Any]) -> NDArray[np.int64]:
    """Cumulative counts (N, n + 1) out of 2**24 of weights (N, n), as constriction rounds them."""
    count = weights.shape[1]
    sums = np.cumsum(weights, axis=1, dtype=np.float64)
    scale = (_WHOLE - count) / sums[:, -1:]
    edges = np.zeros((len(weights), count + 1), np.int64)
    edges[:, 1:-1] = np.floor(sums[:, :-1] * scale).astype(np.int64) + np.arange(1, count)
    edges[:, -1] = _WHOLE
    return edges


class queue:
    """The names of constriction.stream.queue."""

    RangeEncoder, RangeDecoder = RangeEncoder, RangeDecoder


class model:
    """The names of constriction.stream.model."""

    Uniform, Categorical = Uniform, Categorical
