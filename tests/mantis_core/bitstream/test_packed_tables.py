"""Packed tables: they come back as they were, take few bytes, and nothing else is unpacked."""

import zlib

import numpy as np
import pytest

from mantis_core.bitstream.packed_tables import pack_counts, unpack_counts
from mantis_core.symbols import CONTEXTS
from tests.golden.cases import random_tables


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("contexts", [1, CONTEXTS])
def test_tables_come_back_as_they_were(rows, contexts):
    tables = random_tables("primary", rows, 5, 0, contexts=contexts)
    packed = pack_counts(tables.cdf, tables.lengths)
    cdf = unpack_counts(packed, tables.lengths, rows, contexts)
    assert cdf.dtype == np.int32
    assert (cdf == tables.cdf).all()


def test_one_wide_channel_makes_the_others_no_larger():
    tables = random_tables("primary", 2, 4, 1, contexts=CONTEXTS)
    wide = np.pad(tables.cdf, ((0, 0), (0, 0), (0, 2000)), mode="edge")
    assert (pack_counts(wide, tables.lengths) == pack_counts(tables.cdf, tables.lengths)).all()


def test_bytes_of_something_else_are_refused():
    tables = random_tables("primary", 2, 3, 2)
    packed, lengths = pack_counts(tables.cdf, tables.lengths), tables.lengths
    bomb = np.frombuffer(zlib.compress(bytes(2**24)), np.uint8)
    for wrong in (packed[:-1], packed[:0], np.append(packed, np.uint8(0)), bomb, packed[::-1]):
        with pytest.raises(ValueError, match="packed tables are"):
            unpack_counts(wrong, lengths, 2, 1)
    for rows, contexts in ((1, 1), (3, 1), (2, CONTEXTS)):
        with pytest.raises(ValueError, match="not of this model"):
            unpack_counts(packed, lengths, rows, contexts)
    for wrong in (lengths[:0], lengths * 0, lengths * 2**20):
        with pytest.raises(ValueError, match="lengths"):
            unpack_counts(packed, wrong, 2, 1)
