"""The container: round trips, size, refusal of everything that is no stream of this model."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_core.bitstream import (
    BitstreamError,
    Reason,
    Stream,
    StreamSpec,
    dequantise_level,
    pack,
    peek,
    quantise_log2,
    unpack,
)

SPEC = StreamSpec(
    model_id=b"\x01\x02\x03\x04", num_tasks=10, input_shape=(64, 64), latent_channels=16, stride=8
)
MASK = (False, True, False, False, True, False, False, False, False, True)
FULL = Stream(MASK, 4, (0, 15, 3), (300, 70), b"payload")


def sealed(body):
    return body + zlib.crc32(body).to_bytes(4, "big")


def reason_of(data, spec=SPEC):
    with pytest.raises(BitstreamError) as refused:
        unpack(data, spec)
    return refused.value.reason


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_stream_round_trips(data):
    tasks = data.draw(st.integers(1, 40))
    spec = StreamSpec(b"abcd", tasks, (32, 48), 4, 4)
    mask = tuple(data.draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks).filter(any)))
    active = [k for k in range(tasks) if mask[k]]
    levels = st.lists(st.integers(0, 15), min_size=len(active), max_size=len(active)).map(tuple)
    stream = Stream(
        mask,
        data.draw(st.none() | st.sampled_from(active)),
        data.draw(st.none() | levels),
        data.draw(st.just((32, 48)) | st.tuples(st.integers(1, 4000), st.integers(1, 4000))),
        data.draw(st.binary(max_size=50)),
    )
    assert unpack(pack(stream, spec), spec) == stream


@pytest.mark.parametrize(("tasks", "fixed"), [(1, 12), (8, 12), (10, 13), (16, 13), (17, 14)])
def test_mask_only_at_the_models_own_shape_costs_12_to_14_bytes(tasks, fixed):
    spec = StreamSpec(b"abcd", tasks, (64, 64), 16, 8)
    stream = Stream((True,) * tasks, None, None, (64, 64), b"1234567")
    assert len(pack(stream, spec)) == fixed + 7


def test_a_frozen_stream_of_version_1_is_written_and_read_for_ever():
    frozen = bytes.fromhex("ab4d17010203041202" + "04" + "f003" + "ac02" + "46" + "7061796c6f6164")
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
    assert reason_of(sealed(data[:9])) is Reason.TRUNCATED


def test_the_reserved_rate_flag_is_refused():
    data = pack(FULL, SPEC)
    assert reason_of(sealed(data[:2] + b"\x1f" + data[3:-4])) is Reason.VERSION


HEADER = b"\xab\x4d"
ID_AND_MASK = SPEC.model_id + b"\x12\x02"


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
    assert reason_of(sealed(HEADER + b"\x14" + ID_AND_MASK + shape)) is reason


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (0x10, b"\x00\x00"),
        (0x10, b"\x12\x06"),
        (0x11, b"\x12\x02\x00"),
        (0x11, b"\x12\x02\xc8"),
        (0x12, b"\x12\x02\xf0\x13"),
    ],
    ids=["empty mask", "task 10 of 10", "inactive primary", "no such primary", "unused half byte"],
)
def test_a_wrong_task_field_is_corrupt_even_under_a_right_checksum(flags, fields):
    assert reason_of(sealed(HEADER + bytes([flags]) + SPEC.model_id + fields)) is Reason.CORRUPT


def test_streams_over_the_byte_cap_are_refused_before_they_are_read():
    spec = StreamSpec(b"abcd", 1, (8, 8), 1, 1, max_stream_bytes=100)
    assert reason_of(bytes(101), spec) is Reason.TOO_LARGE
    with pytest.raises(BitstreamError) as refused:
        pack(Stream((True,), None, None, (8, 8), bytes(100)), spec)
    assert refused.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "stream",
    [
        Stream((True,), None, None, (64, 64), b""),
        Stream((False,) * 10, None, None, (64, 64), b""),
        Stream(MASK, 0, None, (64, 64), b""),
        Stream(MASK, -1, None, (64, 64), b""),
        Stream(MASK, None, (1, 2), (64, 64), b""),
        Stream(MASK, None, (1, 2, 16), (64, 64), b""),
        Stream(MASK, None, None, (0, 64), b""),
        Stream(MASK, None, None, (2**13, 2**13), b""),
    ],
)
def test_pack_refuses_what_unpack_would_refuse(stream):
    with pytest.raises(BitstreamError):
        pack(stream, SPEC)


def test_the_latent_shape_rounds_up():
    assert SPEC.latent_shape((64, 64)) == (16, 8, 8)
    assert SPEC.latent_shape((65, 1)) == (16, 9, 1)


@pytest.mark.parametrize(
    "change", [{"model_id": b"abc"}, {"num_tasks": 0}, {"num_tasks": 257}, {"stride": 0}]
)
def test_an_impossible_spec_is_refused(change):
    fields = {"model_id": b"abcd", "num_tasks": 2, "stride": 8} | change
    with pytest.raises(ValueError, match=r"must|at least"):
        StreamSpec(input_shape=(64, 64), latent_channels=16, **fields)


def test_peek_reads_a_stream_without_its_model():
    data = pack(FULL, SPEC)
    seen = peek(data)
    assert seen["model_id"] == "01020304"
    assert seen["flags"] == ["primary", "levels", "shape"]
    assert seen["wire_bytes"] == len(data)
    assert seen["checksum_ok"] is True
    assert peek(data[:-1])["checksum_ok"] is False
    with pytest.raises(BitstreamError, match="not a MANTiS stream"):
        peek(b"GIF89a....................")


def test_levels_are_half_bits_and_come_back_within_a_quarter_bit():
    assert [quantise_log2(p) for p in (1.0, 0.5, 0.25, 0.0, 1.0000001, 2**-7.5)] == [
        0, 2, 4, 15, 0, 15,
    ]  # fmt: skip
    for p in np.geomspace(2**-7.5, 1, 200):
        assert abs(np.log2(dequantise_level(quantise_log2(p)) / p)) <= 0.25 + 1e-9
    assert all(quantise_log2(dequantise_level(level)) == level for level in range(16))
    with pytest.raises(ValueError, match="NaN"):
        quantise_log2(float("nan"))
    with pytest.raises(ValueError, match="0 to 15"):
        dequantise_level(16)
