"""Every frozen stream is decoded to what made it, and written again to the same bytes."""

import json

import numpy as np
import pytest

from mantis_core.bitstream.session import read_hello, write_hello
from mantis_core.bitstream.wire import (
    CodedImage,
    read_message,
    read_stream,
    write_message,
    write_stream,
)
from tests.golden.cases import SESSIONS, names, read_case, sessions


def test_there_are_frozen_streams_of_every_kind() -> None:
    assert {"primary", "shared", "per_task", "several", "extreme_symbols"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_frozen_stream_is_read_and_written_for_ever(name: str) -> None:
    data, images, shape, tables, spec = read_case(name)
    found = read_stream(data, tables, spec)
    assert found.input_shape == shape
    assert len(found.images) == len(images)
    for ours, theirs in zip(images, found.images, strict=True):
        assert_same(ours, theirs)
    assert write_stream(images, shape, tables, spec).data == data


@pytest.mark.parametrize("number", range(7))
def test_a_frozen_session_is_read_and_written_for_ever(number: int) -> None:
    session, images, tables, spec = sessions()[number]
    frozen = json.loads(SESSIONS.read_text())[number]
    hello = bytes.fromhex(frozen["hello"])
    assert write_hello(session, spec) == hello
    assert read_hello(hello, spec) == session
    for image, message in zip(images, map(bytes.fromhex, frozen["messages"]), strict=True):
        assert write_message(image, session, hello, tables, spec).data == message
        asked = image.tasks.mask if session.requests else ()
        (found,) = read_message(message, session, hello, tables, spec, asked).images
        assert_same(image, found)


def assert_same(ours: CodedImage, theirs: CodedImage) -> None:
    for name in ("tasks", "label", "confidence", "has_latent", "rate_level"):
        assert getattr(theirs, name) == getattr(ours, name), name
    np.testing.assert_array_equal(theirs.map, ours.map)
