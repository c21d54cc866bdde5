"""Coding integer latents by integer tables: exactness, size, escapes, damage."""

import gc
import itertools
import weakref
from collections import Counter

import numpy as np
import pytest
from constriction import stream
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_core.bitstream.coder import TOTAL, RangeReader, RangeWriter, TableSet, to_symbols
from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.symbols import CONTEXTS, MAX_SYMBOL, pass_of
from tests.golden.cases import random_tables
from tests.mantis_core.payloads import decode, encode


def make_tables(rows=1, channels=4, lengths=None, offset=-3, prior="shared", seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths or [8] * channels, np.int32)
    cdf = np.full((rows, channels, lengths.max() + 1), TOTAL, np.int32)
    for row in range(rows):
        for channel, length in enumerate(lengths):
            cuts = rng.choice(np.arange(1, TOTAL), length - 1, replace=False)
            cdf[row, channel, 0] = 0
            cdf[row, channel, 1:length] = np.sort(cuts)
    return TableSet(prior, cdf, np.full(channels, offset, np.int32), lengths)


def table_of(**kwargs):
    return make_tables(**kwargs).table_for((True,), 0)


def draw(table, height, width, seed=0):
    """Symbols drawn by the table itself, without escapes."""
    rng = np.random.default_rng(seed)
    channels = []
    for row, offset, length in zip(table.cdf, table.offsets, table.lengths, strict=True):
        counts = np.diff(row[:length]).astype(float)
        drawn = rng.choice(length - 1, height * width, p=counts / counts.sum())
        channels.append(drawn + offset)
    return np.stack(channels).reshape(-1, height, width).astype(np.int32)


def ideal_bits(symbols, table):
    bits = 0.0
    for values, row, offset, length in zip(
        symbols, table.cdf, table.offsets, table.lengths, strict=True
    ):
        entries = values.ravel().astype(np.int64) - offset
        outside = (entries < 0) | (entries >= length - 1)
        counts = np.diff(row)[np.where(outside, length - 1, entries)]
        bits += -np.log2(counts / TOTAL).sum()
        distance = np.where(entries < 0, -entries, entries - length + 2)[outside]
        bits += (2 * np.floor(np.log2(distance)) + 2).sum()
    return bits


def decodes_to(payload, table, symbols):
    try:
        return bool((decode(payload, table, symbols.shape) == symbols).all())
    except BitstreamError:
        return False


def test_constriction_uses_the_table_probabilities_to_the_last_bit():
    table = table_of(channels=6, lengths=[2, 3, 8, 40, 300, 2050], seed=3)
    unit = (2**64 - 1) >> 24
    for index, (row, length) in enumerate(zip(table.cdf, table.lengths, strict=True)):
        model = table.model(index)
        for entry in range(length):
            encoder = stream.queue.RangeEncoder()
            encoder.encode(entry, model)
            position, (lower, width) = encoder.pos()
            assert position == 0 or width >= 2**32
            shift = 32 * position
            assert width == (unit * int(row[entry + 1] - row[entry]) * 256 << shift)
            assert lower == (unit * int(row[entry]) * 256 << shift) % 2**64


def test_entries_coded_together_are_coded_as_one_by_one():
    """At both ends of a table and between them, and beyond what is coded at once."""
    table = table_of(channels=600, lengths=[2, 3, 8, 40, 300, 2050] * 100, seed=4)
    rng = np.random.default_rng(4)
    rows = np.sort(rng.integers(0, 600, 20_000))
    entries = rng.integers(0, table.lengths[rows], dtype=np.int32)
    entries[::3], entries[1::5] = 0, table.lengths[rows[1::5]] - 1
    together, alone = RangeWriter(), RangeWriter()
    edges = np.searchsorted(rows, range(601)).tolist()
    together.put_entries(entries, list(zip(range(600), edges, edges[1:], strict=False)), table)
    assert not table._models
    for row, entry in zip(rows.tolist(), entries.tolist(), strict=True):
        alone.put(entry, table.model(row))
    assert together.close() == alone.close()


def test_a_latent_with_contexts_is_written_in_a_few_calls_and_read_in_one_a_table():
    table = random_tables("shared", 1, 12, 0, contexts=CONTEXTS).table_for((True,), 0)
    symbols = np.random.default_rng(0).integers(-1, 1, (12, 12, 12), np.int32)
    writer, payload = RangeWriter(), encode(symbols, table)
    writer._encoder = encoder = Counted(writer._encoder)
    writer.put_symbols(symbols, table)
    assert writer.close() == payload
    assert encoder.calls["encode"] == 12 + 2  # no contexts in the first pass
    reader = RangeReader(payload)
    reader._decoder = decoder = Counted(reader._decoder)
    reader._again._encoder = again = Counted(reader._again._encoder)
    assert (reader.take_symbols(table, symbols.shape) == symbols).all()
    reader.close()
    assert decoder.calls["decode"] <= 12 * CONTEXTS
    assert again.calls["encode"] == 12 + 2


class Counted:
    """Passes every call on and counts it by name."""

    def __init__(self, inner):
        self.inner, self.calls = inner, Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self.inner, name)


def test_one_sided_tables_are_met_exactly_too():
    lengths = np.asarray([5], np.int32)
    cdf = np.asarray([[[0, 1, 2, 3, 4, TOTAL]]], np.int32)
    table = TableSet("shared", cdf, np.zeros(1, np.int32), lengths).table_for((True,), 0)
    symbols = np.asarray([0, 1, 2, 3] * 16, np.int32).reshape(1, 8, 8)
    assert len(encode(symbols, table)) <= 64 * 16 / 8 * 1.001 + 2
    assert (decode(encode(symbols, table), table, (1, 8, 8)) == symbols).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (8, 8), (28, 28)])
@pytest.mark.parametrize("seed", range(8))
def test_a_payload_is_within_two_bytes_and_a_thousandth_of_the_ideal(shape, seed):
    table = table_of(channels=5, lengths=[2, 5, 9, 33, 120], offset=-2, seed=seed)
    symbols = draw(table, *shape, seed=seed)
    payload = encode(symbols, table)
    assert len(payload) <= ideal_bits(symbols, table) / 8 * 1.001 + 2
    assert (decode(payload, table, symbols.shape) == symbols).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_any_symbols_survive_contexts(seed, height, width, reach):
    tables = random_tables("shared", 1, 3, seed, contexts=CONTEXTS)
    table = tables.table_for((True,), 0)
    symbols = np.random.default_rng(seed).integers(-reach, reach + 1, (3, height, width), np.int32)
    payload = encode(symbols, table)
    assert (decode(payload, table, symbols.shape) == symbols).all()


def test_a_symbol_is_coded_by_the_table_of_its_neighbours():
    """Tables that give all but two counts to one entry: only the right one makes it cheap."""
    rows = []
    for context in range(CONTEXTS):
        counts = np.ones(5, np.int64)
        counts[context % 3] = TOTAL - 4
        rows.append(np.concatenate([[0], counts.cumsum()]))
    cdf = np.array([rows], np.int32)
    tables = TableSet("shared", cdf, np.array([-1], np.int32), np.array([5], np.int32))
    table = tables.table_for((True,), 0)
    symbols = np.full((1, 4, 4), -1, np.int32)  # context 0, at even rows and columns
    symbols[0, 1::2, 1::2] = sum_context(symbols, 1) % 3 - 1
    others = pass_of(4, 4) == 2
    symbols[0, others] = (sum_context(symbols, 2) % 3 - 1)[others]
    assert len(encode(symbols, table)) == 1
    symbols[0, 3, 2] = (symbols[0, 3, 2] + 2) % 3 - 1
    assert len(encode(symbols, table)) >= 2


def sum_context(symbols, number):
    """The context of each position of a pass, from the definition; (h, w), or pass 1's alone."""
    height, width = symbols.shape[1:]
    around = {1: [(-1, -1), (-1, 1), (1, -1), (1, 1)], 2: [(-1, 0), (1, 0), (0, -1), (0, 1)]}
    found = np.zeros((height, width), int)
    for row, column in np.ndindex(height, width):
        total = sum(
            min(2, max(-2, int(symbols[0, row + down, column + right])))
            for down, right in around[number]
            if 0 <= row + down < height and 0 <= column + right < width
        )
        found[row, column] = 1 + 7 * (number - 1) + 3 + min(3, max(-3, total))
    return found[1::2, 1::2] if number == 1 else found


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(-MAX_SYMBOL, MAX_SYMBOL) | st.integers(-6, 6), min_size=1, max_size=40),
)
def test_any_symbols_survive_with_a_cost_near_the_ideal(seed, values):
    table = table_of(channels=1, lengths=[6], offset=-2, seed=seed)
    symbols = np.asarray(values, np.int32).reshape(1, 1, -1)
    payload = encode(symbols, table)
    assert (decode(payload, table, symbols.shape) == symbols).all()
    assert len(payload) <= ideal_bits(symbols, table) / 8 * 1.001 + 2


@pytest.mark.parametrize("value", [MAX_SYMBOL, -MAX_SYMBOL, 2**16, 5, -4, -3, 4])
def test_extreme_symbols_round_trip_in_a_one_symbol_latent(value):
    table = table_of(channels=1)
    symbols = np.full((1, 1, 1), value, np.int32)
    assert (decode(encode(symbols, table), table, (1, 1, 1)) == symbols).all()


def test_the_farthest_escape_from_the_farthest_table_round_trips():
    table = table_of(channels=1, offset=MAX_SYMBOL - 20)
    symbols = np.asarray([[[-MAX_SYMBOL, MAX_SYMBOL]]], np.int32)
    assert (decode(encode(symbols, table), table, (1, 1, 2)) == symbols).all()


def test_carries_through_long_runs_of_ones_are_resolved():
    cdf = np.asarray([[[0, 1, TOTAL - 1, TOTAL]]], np.int32)
    tables = TableSet("shared", cdf, np.zeros(1, np.int32), np.asarray([3], np.int32))
    table = tables.table_for((True,), 0)
    rng = np.random.default_rng(0)
    for length in range(1, 120):
        symbols = np.minimum(rng.integers(0, 40, (1, 1, length)), 2).astype(np.int32)
        symbols = 2 - symbols if length % 2 else symbols
        payload = encode(symbols, table)
        assert (decode(payload, table, symbols.shape) == symbols).all()
        assert len(payload) <= ideal_bits(symbols, table) / 8 * 1.001 + 2


def test_no_shorter_string_decodes_to_the_same_symbols():
    table = table_of(channels=1)
    symbols = draw(table, 4, 4)
    payload = encode(symbols, table)
    for cut in range(len(payload)):
        assert not decodes_to(payload[:cut], table, symbols)


def test_bytes_left_over_are_refused():
    table = table_of()
    symbols = draw(table, 8, 8)
    payload = encode(symbols, table)
    assert decodes_to(payload, table, symbols)
    for extra in (b"\0", b"\1", bytes(9), payload):
        with pytest.raises(BitstreamError) as refused:
            decode(payload + extra, table, symbols.shape)
        assert refused.value.reason is Reason.CORRUPT


def test_random_bytes_are_refused_or_are_exactly_what_they_decode_to():
    table = table_of(channels=3, lengths=[3, 9, 20])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        payload = rng.bytes(int(rng.integers(0, 60)))
        try:
            symbols = decode(payload, table, (3, 4, 4))
        except BitstreamError:
            refused += 1
        else:
            assert encode(symbols, table) == payload
    assert refused > 150


def test_a_flipped_payload_bit_never_gives_the_symbols_that_were_sent():
    table = table_of()
    symbols = draw(table, 4, 4)
    symbols[0, 0, 0] = 1000
    payload = encode(symbols, table)
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not decodes_to(bytes(damaged), table, symbols)


def test_a_frozen_payload_is_written_and_read_for_ever():
    cdf = np.asarray([[[0, 100, 60000, 65000, TOTAL], [0, 30000, 65535, TOTAL, TOTAL]]], np.int32)
    tables = TableSet("shared", cdf, np.asarray([-1, 0], np.int32), np.asarray([4, 3], np.int32))
    symbols = np.asarray([[[0, 0, 1, -1], [0, 7, 0, 0]], [[0, 1, 0, 0], [1, -90, 1, 0]]], np.int32)
    payload = encode(symbols, tables.table_for((True,), 0))
    assert payload.hex() == GOLDEN_PAYLOAD
    assert tables.digest().hex()[:16] == GOLDEN_DIGEST


def test_symbols_beyond_the_cap_and_wrong_shapes_are_refused_by_the_encoder():
    table = table_of(channels=2)
    with pytest.raises(ValueError, match="beyond"):
        encode(np.full((2, 1, 1), MAX_SYMBOL + 1, np.int32), table)
    with pytest.raises(ValueError, match="beyond"):
        encode(np.full((2, 1, 1), -(2**31), np.int32), table)
    with pytest.raises(ValueError, match="shape"):
        encode(np.zeros((3, 1, 1), np.int32), table)
    with pytest.raises(ValueError, match="shape"):
        decode(b"", table, (2, 0, 1))


def test_latents_are_rounded_half_to_even_and_clamped():
    latent = np.asarray([0.5, 1.5, -0.5, 2.6, 1e30, -np.inf], np.float32)
    assert to_symbols(latent).tolist() == [0, 2, 0, 3, MAX_SYMBOL, -MAX_SYMBOL]
    with pytest.raises(ValueError, match="NaN"):
        to_symbols(np.asarray([np.nan], np.float32))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
def test_the_mixture_is_the_floor_of_the_mean_of_active_rows_and_a_valid_table(seed, mask):
    tables = make_tables(rows=5, channels=2, lengths=[4, 9], prior="per_task", seed=seed)
    mixed = tables.table_for(np.asarray(mask), 0).cdf
    active = [row for row, a in zip(tables.cdf.tolist(), mask, strict=True) if a]
    for channel in range(2):
        by_hand = [
            sum(column) // len(active) for column in zip(*[r[channel] for r in active], strict=True)
        ]
        assert mixed[channel].tolist() == by_hand
        length = tables.lengths[channel]
        assert by_hand[0] == 0
        assert by_hand[length] == TOTAL
        assert (np.diff(by_hand[: length + 1]) >= 1).all()


def test_each_prior_picks_its_rows():
    mask = (True, False, True)
    per_task = make_tables(rows=3, prior="per_task")
    primary = TableSet("primary", per_task.cdf, per_task.offsets, per_task.lengths)
    assert (primary.table_for(mask, 2).cdf == primary.cdf[2]).all()
    assert (per_task.table_for((False, True, False), 0).cdf == per_task.cdf[1]).all()
    assert (make_tables().table_for(mask, 2).cdf == make_tables().cdf[0]).all()
    with pytest.raises(ValueError, match="at least one"):
        per_task.table_for((False, False, False), 0)
    with pytest.raises(ValueError, match="0 to 2"):
        primary.table_for(mask, 3)


def test_mixtures_are_kept_but_not_beyond_their_tables():
    tables = make_tables(rows=9, channels=1, prior="per_task")
    masks = list(itertools.product((False, True), repeat=9))[1:]
    first = tables.table_for(masks[0], 0)
    assert tables.table_for(masks[0], 0) is first
    for mask in masks:
        tables.table_for(mask, 0)
    again = tables.table_for(masks[0], 0)
    assert again is not first
    assert (again.cdf == first.cdf).all()
    kept = weakref.ref(again)
    del tables, again
    gc.collect()
    assert kept() is None


def test_the_digest_sees_every_change():
    tables = make_tables(rows=3, prior="per_task")
    assert len(tables.digest()) == 32
    same = TableSet(tables.prior, tables.cdf.copy(), tables.offsets.copy(), tables.lengths.copy())
    assert same.digest() == tables.digest()
    moved = TableSet(tables.prior, tables.cdf, tables.offsets + np.int32(1), tables.lengths)
    other = TableSet("primary", tables.cdf, tables.offsets, tables.lengths)
    assert len({tables.digest(), moved.digest(), other.digest()}) == 3


@pytest.mark.parametrize(
    "breakage",
    [
        lambda a: a["cdf"].__setitem__((0, 0, 2), a["cdf"][0, 0, 1]),
        lambda a: a["cdf"].__setitem__((0, 0, 0), 1),
        lambda a: a["cdf"].__setitem__((0, 0, -1), TOTAL - 1),
        lambda a: a["lengths"].__setitem__(0, 7),
        lambda a: a["offsets"].__setitem__(0, -(2**31)),
        lambda a: a.update(prior="rows"),
        lambda a: a.update(cdf=a["cdf"][0]),
        lambda a: a.update(cdf=a["cdf"].astype(np.int64)),
    ],
)
def test_arrays_that_are_no_tables_are_refused(breakage):
    tables = make_tables()
    arrays = {name: getattr(tables, name).copy() for name in ("cdf", "offsets", "lengths")}
    arrays["prior"] = tables.prior
    breakage(arrays)
    with pytest.raises(ValueError, match=r"tables|prior is"):
        TableSet(**arrays)


GOLDEN_PAYLOAD = "c4911e70bdbcbcc3"
GOLDEN_DIGEST = "8570f2ebed5a5154"
