"""The container: round trips, size, refusal of everything that is no stream of this model."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_core.bitstream.container import (
    MAX_IMAGES,
    BitstreamError,
    Reason,
    Stream,
    StreamSpec,
    pack,
    peek,
    unpack,
)

SPEC = StreamSpec(
    model_id=b"\x01\x02\x03\x04", num_tasks=10, input_shape=(64, 64), latent_channels=16, stride=8
)
FULL = Stream(3, (300, 70), True, b"payload")


def sealed(body):
    return body + zlib.crc32(body).to_bytes(4, "big")


def reason_of(data, spec=SPEC):
    with pytest.raises(BitstreamError) as refused:
        unpack(data, spec)
    return refused.value.reason


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_stream_round_trips(data):
    spec = StreamSpec(b"abcd", data.draw(st.integers(1, 40)), (32, 48), 4, 4)
    stream = Stream(
        data.draw(st.just(1) | st.integers(1, 4)),
        data.draw(st.just((32, 48)) | st.tuples(st.integers(1, 4000), st.integers(1, 4000))),
        data.draw(st.booleans()),
        data.draw(st.binary(max_size=50)),
    )
    assert unpack(pack(stream, spec), spec) == stream


def test_one_image_of_the_models_own_shape_costs_11_bytes_several_one_or_two_more():
    for count, fixed in [(1, 11), (2, 12), (127, 12), (128, 13), (256, 13)]:
        stream = Stream(count, (64, 64), True, b"1234567")
        assert len(pack(stream, SPEC)) == fixed + 7


def test_a_frozen_container_of_version_1_is_written_and_read_for_ever():
    frozen = bytes.fromhex("ab4d17" + "01020304" + "03" + "ac02" + "46" + "7061796c6f6164")
    assert pack(FULL, SPEC) == sealed(frozen)
    assert unpack(sealed(frozen), SPEC) == FULL


def test_every_flipped_bit_is_refused():
    data = pack(FULL, SPEC)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert reason_of(bytes(damaged)) in (Reason.NOT_A_STREAM, Reason.VERSION, Reason.CORRUPT)


def test_every_truncation_and_every_appended_byte_is_refused():
    data = pack(FULL, SPEC)
    for length in range(len(data)):
        assert reason_of(data[:length]) in (Reason.TRUNCATED, Reason.CORRUPT)
    for extra in range(256):
        assert reason_of(data + bytes([extra])) is Reason.CORRUPT


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_and_without_a_valid_frame(noise):
    reason_of(noise)
    framed = sealed(b"\xab\x4d" + bytes([0x10 | noise[0] % 16 if noise else 0x10]) + noise)
    reason_of(framed)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 15), st.binary(max_size=40))
def test_whatever_is_accepted_is_the_one_spelling_of_its_content(flags, noise):
    data = sealed(b"\xab\x4d" + bytes([0x10 | flags]) + SPEC.model_id + noise)
    try:
        stream = unpack(data, SPEC)
    except BitstreamError:
        return
    assert pack(stream, SPEC) == data


def test_another_model_another_version_and_other_files_are_told_apart():
    data = pack(FULL, SPEC)
    other = StreamSpec(b"\xff\x02\x03\x04", 10, (64, 64), 16, 8)
    assert reason_of(data, other) is Reason.ANOTHER_MODEL
    assert reason_of(sealed(data[:2] + b"\x27" + data[3:-4])) is Reason.VERSION
    assert reason_of(b"\xff\xd8\xff\xe0" + data) is Reason.NOT_A_STREAM
    assert reason_of(b"") is Reason.TRUNCATED
    assert reason_of(sealed(data[:6])) is Reason.TRUNCATED


def test_the_reserved_rate_flag_is_refused():
    data = pack(FULL, SPEC)
    assert reason_of(sealed(data[:2] + b"\x1f" + data[3:-4])) is Reason.VERSION


START = b"\xab\x4d"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\x7f", Reason.TOO_LARGE),
        (b"\xff\xff\xff\xff\xff\x7f\x01", Reason.TOO_LARGE),
        (b"\x80\x80\x04\x80\x80\x04", Reason.TOO_LARGE),
        (b"\x00\x05", Reason.CORRUPT),
        (b"\x05\x00", Reason.CORRUPT),
        (b"\x85\x00\x05", Reason.CORRUPT),
        (b"\x40\x40", Reason.CORRUPT),
        (b"\x05", Reason.TRUNCATED),
        (b"\x85\x85", Reason.TRUNCATED),
    ],
)
def test_absurd_shapes_are_refused(shape, reason):
    assert reason_of(sealed(START + b"\x14" + SPEC.model_id + shape)) is reason


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (b"\x00", Reason.CORRUPT),
        (b"\x01", Reason.CORRUPT),
        (b"\x82\x00", Reason.CORRUPT),
        (b"\x81\x02", Reason.TOO_LARGE),
        (b"\xff\xff\xff\xff\x7f", Reason.TOO_LARGE),
        (b"", Reason.TRUNCATED),
    ],
)
def test_absurd_numbers_of_images_are_refused(count, reason):
    assert reason_of(sealed(START + b"\x11" + SPEC.model_id + count)) is reason


def test_all_images_of_a_stream_share_one_limit_of_pixels():
    spec = StreamSpec(b"abcd", 1, (64, 64), 1, 8, max_pixels=10_000, max_total_pixels=30_000)
    assert unpack(pack(Stream(3, (100, 100), False, b""), spec), spec).num_images == 3
    with pytest.raises(BitstreamError) as refused:
        pack(Stream(4, (100, 100), False, b""), spec)
    assert refused.value.reason is Reason.TOO_LARGE


def test_streams_over_the_byte_cap_are_refused_before_they_are_read():
    spec = StreamSpec(b"abcd", 1, (8, 8), 1, 1, max_stream_bytes=100)
    assert reason_of(bytes(101), spec) is Reason.TOO_LARGE
    with pytest.raises(BitstreamError) as refused:
        pack(Stream(1, (8, 8), False, bytes(100)), spec)
    assert refused.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "stream",
    [
        Stream(0, (64, 64), False, b""),
        Stream(MAX_IMAGES + 1, (64, 64), False, b""),
        Stream(1, (0, 64), False, b""),
        Stream(1, (2**13, 2**13), False, b""),
    ],
)
def test_pack_refuses_what_unpack_would_refuse(stream):
    with pytest.raises(BitstreamError):
        pack(stream, SPEC)


def test_the_latent_shape_rounds_up():
    assert SPEC.latent_shape((64, 64)) == (16, 8, 8)
    assert SPEC.latent_shape((65, 1)) == (16, 9, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": b"abc"},
        {"num_tasks": 0},
        {"num_tasks": 257},
        {"stride": 0},
        {"latent_channels": 0},
    ],
)
def test_an_impossible_spec_is_refused(change):
    fields = {"model_id": b"abcd", "num_tasks": 2, "stride": 8, "latent_channels": 16} | change
    with pytest.raises(ValueError, match=r"must|at least"):
        StreamSpec(input_shape=(64, 64), **fields)


def test_peek_reads_a_stream_without_its_model():
    data = pack(FULL, SPEC)
    assert peek(data) == {
        "version": 1,
        "flags": ["several", "levels", "shape"],
        "stream_id": "01020304",
        "images": 3,
        "input_shape": [300, 70],
        "wire_bytes": len(data),
        "body_bytes": 7,
    }
    assert peek(pack(Stream(1, (64, 64), False, b""), SPEC))["input_shape"] is None
    with pytest.raises(BitstreamError, match="checksum"):
        peek(data[:-1])
    with pytest.raises(BitstreamError, match="not a MANTiS stream"):
        peek(b"GIF89a....................")
