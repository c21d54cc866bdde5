"""Integer tables and lossless coding by them, without torch. `codec/tables.py` makes the tables.

R prior rows, C channels, X contexts, L table entries of the longest channel, K tasks, h w latent.

A channel has X tables: one, or one for each context of `symbols.py`. Each covers the symbols from
offset to offset + length - 2; its last entry is the escape, for any other symbol. Tables are
cumulative counts out of 2**16, so nothing here depends on floating point.

Everything coded is one number (constriction's RangeEncoder). A latent is coded in this order:
- the table entries, channel by channel; with contexts pass by pass, within a pass channel by
  channel, within a channel context by context;
- of the escaped symbols, channel by channel, all classes, then all signs, then the mantissas class
  by class.
As a neighbour, an escaped symbol counts as the one above its table. An escape at distance d >= 0
beyond its table has class k = floor(log2(d + 1)), probability 2**-(k + 1), then a sign bit and the
k low bits of d + 1 (Elias' gamma code, 1975). Of the coder's state only the fewest bytes are kept
that, with zeros behind, lie in the final interval. A reader of format version 1 refuses any other
spelling; one of version 2 has a checksum for that, and does not code again what it reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, get_args
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.bitstream.entropy import stream
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, Prior, coding_order, passes

PRECISION = 16
TOTAL = 1 << PRECISION
Ints: TypeAlias = NDArray[np.int32]
Runs: TypeAlias = list[tuple[int, int, int]]
_CODER_PRECISION = 24  # constriction's fixed point
_CODER_TOTAL = 1 << _CODER_PRECISION
_FINER = _CODER_PRECISION - PRECISION
_ANY_MODEL = stream.model.Categorical(perfect=False)
# With few tables, or this many entries a table, a call for each is faster than one for all.
_FEW_RUNS = 16
_LONG_RUN = 128
_AT_ONCE = 1 << 14  # entries whose models are made at once: half a megabyte
_NO_LATENT = "the coded part is no coded latent"
_WORD_BYTES = 4
_STATE_BITS = 64
_TABLES_IN_MEMORY = 256  # of a TableSet


@dataclass(frozen=True, eq=False)
class Table:
    """What one image is coded with.

    `cdf` is (C * X, L + 1), a channel's tables one after the other: each rises strictly from 0 to
    TOTAL over its first lengths[c] + 1 columns and stays there. `offsets` and `lengths` are (C,).
    """

    cdf: Ints
    offsets: Ints
    lengths: Ints
    _models: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def contexts(self) -> int:
        """X."""
        return len(self.cdf) // len(self.lengths)

    def model(self, index: int) -> Any:
        """constriction's model of row `index` of `cdf`, made when it is first needed."""
        if index not in self._models:
            length = self.lengths[index // self.contexts]
            self._models[index] = exact_model(np.diff(self.cdf[index, : length + 1]))
        return self._models[index]

    @cached_property
    def bounds(self) -> tuple[Ints, Ints]:
        """First symbol and index of the escape entry of each channel, (C, 1) each."""
        return self.offsets[:, None], np.ascontiguousarray(self.lengths[:, None] - 1)


@dataclass(frozen=True, eq=False)
class TableSet:
    """Every table of a model: all the entropy coding needs, on the client and on the server.

    `cdf` is (G * R, C * X, L + 1) int32, level after level, `offsets` and `lengths` (C,) int32: all
    tables of a channel share one range of symbols. R is 1 for the shared prior, K else, and G
    `levels`. ValueError if the arrays are no such tables.
    """

    prior: Prior
    cdf: Ints
    offsets: Ints
    lengths: Ints
    levels: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= len(self.cdf) or len(self.cdf) % self.levels:
            raise ValueError(f"{len(self.cdf)} rows of tables are not {self.levels} times as many")
        if self.prior not in get_args(Prior):
            raise ValueError(f"prior is {self.prior!r}, must be one of {get_args(Prior)}")
        if (
            self.cdf.ndim != 3
            or self.offsets.shape != self.lengths.shape
            or self.cdf.shape[1] not in (self.lengths.size, self.lengths.size * CONTEXTS)
        ):
            raise ValueError("tables have shapes that do not fit each other")
        if any(a.dtype != np.int32 for a in (self.cdf, self.offsets, self.lengths)):
            raise ValueError("tables must be int32")
        entries = self.cdf.shape[2] - 1
        lengths = np.repeat(self.lengths, self.cdf.shape[1] // self.lengths.size)
        inside = np.arange(entries) < lengths[:, None]
        if (
            self.lengths.min() < 2
            or self.lengths.max() != entries
            or np.abs(self.offsets.astype(np.int64)).max() + entries > MAX_SYMBOL
            or not all(_rises(row, inside) for row in self.cdf)
        ):
            raise ValueError(f"tables do not rise strictly from 0 to {TOTAL} within their lengths")

    def table_for(
        self, mask: NDArray[np.bool_] | tuple[bool, ...], primary: int, level: int = 0
    ) -> Table:
        """The table of an image with active tasks `mask` (K,) and most probable task `primary`.

        `level` is the rate level it is coded at.

        shared: the only row. primary: the row of that task. per_task: the mixture of the m active
        rows, cdf[j] = floor(sum of the rows' cdf[j] / m): it ends at TOTAL and rises by at least 1
        for each entry, since the sum rises by at least m. request: the row of the only active task,
        and a row of its own, the last, where there are several. A prior ignores the argument that
        it does not need.
        """
        own = len(self.cdf) // self.levels
        if self.prior == "shared":
            rows: tuple[int, ...] = (0,)
        elif self.prior == "primary":
            rows = (int(primary),)
        else:
            rows = tuple(np.flatnonzero(np.asarray(mask)).tolist())
            if self.prior == "request" and len(rows) > 1:
                rows = (own - 1,)
        if not rows or not 0 <= min(rows) <= max(rows) < own:
            raise ValueError(f"tasks {list(rows)}: need at least one of 0 to {own - 1}")
        if not 0 <= level < self.levels:
            raise ValueError(f"rate level {level}: the tables have {self.levels}")
        rows = tuple(level * own + row for row in rows)
        made = _MIXTURES.setdefault(self, {})
        table = made.get(rows)
        if table is None:
            total = self.cdf[list(rows)].sum(axis=0, dtype=np.int64)
            table = Table((total // len(rows)).astype(np.int32), self.offsets, self.lengths)
            if len(made) >= _TABLES_IN_MEMORY:  # another thread may have taken the same one out
                made.pop(next(iter(made)), None)
            made[rows] = table
        return table

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of prior and tables, the same on every machine."""
        sha = hashlib.sha256(self.prior.encode())
        for array in (self.cdf, self.offsets, self.lengths):
            sha.update(np.asarray(array.shape, "<i8").tobytes())
            sha.update(np.ascontiguousarray(array, "<i4").tobytes())
        return sha.digest()


_MIXTURES: WeakKeyDictionary[TableSet, dict[tuple[int, ...], Table]] = WeakKeyDictionary()
"""What `table_for` has made, for as long as its TableSet lives."""


def to_symbols(latent: NDArray[np.float32]) -> Ints:
    """A latent rounded (half to even) and clamped to +-MAX_SYMBOL; ValueError on NaN."""
    if np.isnan(latent).any():
        raise ValueError("the latent holds NaN: the image or the encoder's weights are not finite")
    return np.clip(np.rint(latent), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int32)


class RangeWriter:
    """Writes values one after the other into one range-coded number."""

    def __init__(self) -> None:
        self._encoder = stream.queue.RangeEncoder()

    def put(self, values: int | Ints, model: Any) -> None:
        """One value, or a row of them (N,), under a constriction model."""
        self._encoder.encode(values, model)

    def put_symbols(self, symbols: Ints, table: Table) -> None:
        """A latent (C, h, w); ValueError on a wrong shape or type or one over +-MAX_SYMBOL."""
        channels = len(table.lengths)
        if symbols.ndim != 3 or symbols.shape[0] != channels or symbols.size == 0:
            raise ValueError(f"symbols have shape {symbols.shape}, must be ({channels}, h, w)")
        if symbols.dtype != np.int32:
            raise ValueError(f"symbols are {symbols.dtype}, must be int32")
        values = symbols.reshape(channels, -1)
        first, escape = table.bounds
        entries = values - first
        escaped = entries.view(np.uint32) >= escape.view(np.uint32)  # below 0 is a large number
        some_escaped = bool(escaped.any())
        if some_escaped:
            if max(-int(values.min()), int(values.max())) > MAX_SYMBOL:
                raise ValueError(f"a symbol is beyond +-{MAX_SYMBOL}")
            entries = np.where(escaped, escape, entries)
        for number in passes(table.contexts):
            where, runs = coding_order(entries, table.offsets, symbols.shape, number)
            self.put_entries(entries.reshape(-1)[where], runs, table)
        if some_escaped:
            channel_of = np.nonzero(escaped)[0]
            self._put_escapes(values[escaped].astype(np.int64), *_range_of(table, channel_of))

    def put_entries(self, entries: Ints, runs: Runs, table: Table) -> None:
        """Entries (N,) of tables, in runs as of `coding_order`.

        Tables of many entries take a call each. Those of a few are coded together, which spares
        calls and the making of their models, at twice the time for an entry.
        """
        if len(runs) <= _FEW_RUNS + len(entries) // _LONG_RUN:
            for row, start, stop in runs:
                self._encoder.encode(entries[start:stop], table.model(row))
        else:
            self._put_one_by_one(entries, runs, table)

    def _put_one_by_one(self, entries: Ints, runs: Runs, table: Table) -> None:
        """As `put_entries`, each entry by a model of its own, in one call for thousands.

        An entry is one of three of its model: what is below it, itself, what is above. At an end of
        its table it is the first or the last, and the other side is cut in two.
        """
        rows, starts, stops = np.array(runs).T
        index = np.repeat(rows * table.cdf.shape[1], stops - starts) + entries
        flat = table.cdf.reshape(-1)
        for start in range(0, len(index), _AT_ONCE):
            own = index[start : start + _AT_ONCE]
            lower, upper = flat[own] << _FINER, flat[own + 1] << _FINER
            chosen = np.ones(len(own), np.int32)
            first, last = np.flatnonzero(lower == 0), np.flatnonzero(upper == _CODER_TOTAL)
            lower[first], upper[first], chosen[first] = upper[first], upper[first] + 2, 0
            lower[last], upper[last], chosen[last] = lower[last] - 2, lower[last], 2
            weights = np.empty((len(own), 3))
            weights[:, 0], weights[:, 1], weights[:, 2] = lower, upper - lower, _CODER_TOTAL - upper
            weights -= 1  # as in `exact_model`
            self._encoder.encode(chosen, _ANY_MODEL, weights)

    def close(self) -> bytes:
        """The fewest bytes of the state that, with zeros behind, lie in the final interval.

        Words that the coder has given out stay whole, even if they end in zeros: so a short string
        never stands for a long message. constriction seals with one or two whole words. Its `pos`
        gives the interval's lower end (modulo 2**64, the sealed words hold what is above) and
        width, at `position` words plus the 64-bit state.
        """
        position, (lower, width) = self._encoder.pos()
        words = self._encoder.get_compressed()
        total_bytes = position * _WORD_BYTES + _STATE_BITS // 8
        sealed = int.from_bytes(words.astype(">u4").tobytes(), "big")
        sealed <<= 8 * (total_bytes - len(words) * _WORD_BYTES)
        low = sealed - (sealed - lower) % (1 << _STATE_BITS)
        for dropped in range(_STATE_BITS // 8, -1, -1):
            rounded_up = -(-low >> 8 * dropped)
            if rounded_up << 8 * dropped < low + width:
                return int(rounded_up).to_bytes(total_bytes - dropped, "big")
        raise AssertionError("the interval holds its own lower end")

    def _put_escapes(self, values: NDArray[Any], first: NDArray[Any], last: NDArray[Any]) -> None:
        above = values > last
        distance = np.where(above, values - last, first - values)  # d + 1 of the docstring
        classes = (np.frexp(distance)[1] - 1).astype(np.int32)
        self.put(classes, GAMMA_CLASS)
        self.put(above.astype(np.int32), stream.model.Uniform(2))
        for k in range(1, _ESCAPE_CLASSES):
            mantissas = distance[classes == k] - (1 << k)
            if mantissas.size:
                self.put(mantissas.astype(np.int32), stream.model.Uniform(1 << k))


class RangeReader:
    """Reads back what a RangeWriter wrote, given the same models in the same order.

    Any bytes can be read. If `exact`, all that is read is coded again, and `close` tells whether
    the bytes were the ones a writer makes. That takes nearly half of the time.
    """

    def __init__(self, data: bytes, *, exact: bool = True) -> None:
        padding = bytes(_STATE_BITS // 8 + -len(data) % _WORD_BYTES)
        words = np.frombuffer(data + padding, ">u4").astype(np.uint32)
        self._data = data
        self._decoder = stream.queue.RangeDecoder(words)
        self._again = RangeWriter() if exact else None

    def take(self, model: Any) -> int:
        """One value under a constriction model; BitstreamError if no writer can have made it."""
        return int(self._take(model))

    def take_row(self, model: Any, count: int) -> Ints:
        """`count` values (count,) under one model, else as `take`."""
        return self._take(model, count)  # type: ignore[no-any-return]

    def take_symbols(self, table: Table, shape: tuple[int, int, int]) -> Ints:
        """A latent (C, h, w). BitstreamError (corrupt) for one over +-MAX_SYMBOL."""
        channels, height, width = shape
        if channels != len(table.lengths) or min(height, width) < 1:
            raise ValueError(f"shape {shape} does not fit a table of {len(table.lengths)} channels")
        entries = np.zeros((channels, height * width), np.int32)
        for number in passes(table.contexts):
            where, runs = coding_order(entries, table.offsets, shape, number)
            entries.reshape(-1)[where] = self._take_entries(len(where), runs, table)
        symbols: Ints = entries + table.offsets[:, None]
        escaped = entries == table.lengths[:, None] - 1
        if escaped.any():
            channel_of = np.nonzero(escaped)[0]
            values = self._take_escapes(*_range_of(table, channel_of))
            if np.abs(values).max() > MAX_SYMBOL:
                raise BitstreamError(Reason.CORRUPT, f"a symbol is beyond +-{MAX_SYMBOL}")
            symbols[escaped] = values
        return symbols.reshape(shape)

    def close(self) -> None:
        """BitstreamError (corrupt), if `exact`, unless the data is what codes the values read.

        The values were coded again as they were read: constriction's decoder does not tell its
        state. So all is found that is left over, missing or spelled otherwise.
        """
        if self._again is not None and self._again.close() != self._data:
            raise BitstreamError(
                Reason.CORRUPT, "the coded part is not the coded form of what it decodes to"
            )

    def _take(self, model: Any, *count: int) -> Any:
        try:
            values = self._decoder.decode(model, *count)
        except AssertionError as error:  # constriction's word for a number no encoder makes
            raise BitstreamError(Reason.CORRUPT, _NO_LATENT) from error
        if self._again is not None:
            self._again.put(values, model)
        return values

    def _take_entries(self, count: int, runs: Runs, table: Table) -> Ints:
        """Entries (count,) of tables, in runs as of `coding_order`: a call for each run."""
        entries = np.empty(count, np.int32)
        try:
            for row, start, stop in runs:
                entries[start:stop] = self._decoder.decode(table.model(row), stop - start)
        except AssertionError as error:
            raise BitstreamError(Reason.CORRUPT, _NO_LATENT) from error
        if self._again is not None:
            self._again.put_entries(entries, runs, table)
        return entries

    def _take_escapes(self, first: NDArray[Any], last: NDArray[Any]) -> NDArray[np.int64]:
        classes = self.take_row(GAMMA_CLASS, len(first))
        above = self.take_row(stream.model.Uniform(2), len(first)).astype(bool)
        distance = np.ones(len(first), np.int64)
        for k in range(1, _ESCAPE_CLASSES):
            chosen = classes == k
            count = int(chosen.sum())
            if count:
                distance[chosen] = (1 << k) + self.take_row(stream.model.Uniform(1 << k), count)
        return np.where(above, last + distance, first - distance)


def exact_model(counts: NDArray[Any], precision: int = PRECISION) -> Any:
    """constriction's model with exactly the probabilities counts / 2**precision, n of them.

    Categorical(perfect=False) places entry i at floor(sum(weights[:i]) * scale) + i out of 2**24,
    with scale = (2**24 - n) / sum(weights). For weights = counts * 2**(24 - precision) - 1 the
    scale is exactly 1 and every sum an integer below 2**53, so each probability is met to the last
    bit.
    """
    weights = counts.astype(np.int64) * (1 << _CODER_PRECISION - precision) - 1
    return stream.model.Categorical(weights.astype(np.float64), perfect=False)


# Classes 0..20 reach the distance 2**21 - 2 > MAX_SYMBOL + offset; the last takes what is left.
_ESCAPE_CLASSES = 21
_CLASS_COUNTS = np.array([*(1 << 23 - k for k in range(20)), 1 << 4])
GAMMA_CLASS = exact_model(_CLASS_COUNTS, _CODER_PRECISION)
"""Class k = floor(log2 n) of a number n >= 1, probability 2**-(k + 1): Elias' gamma code."""


def _rises(row: Ints, inside: NDArray[np.bool_]) -> bool:
    """Whether tables (C * X, L + 1) rise from 0 to TOTAL where `inside` (C * X, L), else stay."""
    if row.min() < 0 or (row[:, 0] != 0).any() or (row[:, -1] != TOTAL).any():
        return False
    counts = np.diff(row)
    return counts.min() >= 0 and bool(((counts > 0) == inside).all())


def _range_of(table: Table, channel: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """First and last symbol in the tables of the channels, each (N,)."""
    first = table.offsets[channel].astype(np.int64)
    return first, first + table.lengths[channel] - 2
