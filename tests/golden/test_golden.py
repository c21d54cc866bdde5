"""Every frozen stream is decoded to what made it, and written again to the same bytes."""

import numpy as np
import pytest

from mantis_core.bitstream.wire import read_stream, write_stream
from tests.golden.cases import names, read_case


def test_there_are_frozen_streams_of_every_kind() -> None:
    assert {"primary", "shared", "per_task", "several", "extreme_symbols"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_frozen_stream_is_read_and_written_for_ever(name: str) -> None:
    data, images, shape, tables, spec = read_case(name)
    found = read_stream(data, tables, spec)
    assert found.input_shape == shape
    assert len(found.images) == len(images)
    for ours, theirs in zip(images, found.images, strict=True):
        assert theirs.tasks == ours.tasks
        np.testing.assert_array_equal(theirs.map, ours.map)
    assert write_stream(images, shape, tables, spec).data == data
