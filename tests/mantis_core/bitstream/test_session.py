"""Sessions without networks: hellos, messages, requests, the client's answer, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from mantis_core.bitstream.coder import TOTAL
from mantis_core.bitstream.container import BitstreamError, Reason, StreamSpec
from mantis_core.bitstream.session import Session, read_hello, write_hello
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import (
    CodedImage,
    read_message,
    read_stream,
    write_message,
    write_stream,
)
from tests.golden.cases import named_image, random_image, random_tables, sure_counts

TASKS, LABELS = 5, 7
SPEC = StreamSpec(
    b"abcd",
    TASKS,
    (32, 32),
    3,
    8,
    labels=(LABELS, 0, 1, LABELS, LABELS),
    version=2,
    rate_levels=3,
    confidence=sure_counts(1),
)
TABLES = random_tables("primary", TASKS, 3, 0, levels=3)
ONE_RATE = random_tables("primary", TASKS, 3, 0)
SHAPE = (3, 4, 4)
SESSION = Session((32, 32), with_levels=True, with_answers=True)
HELLO = write_hello(SESSION, SPEC)
PLAIN = replace(SPEC, labels=(), confidence=(), rate_levels=1)


def named(seed, *, levels=True, answered=False):
    return named_image(SPEC, SHAPE, levels=levels, seed=seed, answered=answered)


def refusal(call, *arguments):
    with pytest.raises(BitstreamError) as refused:
        call(*arguments)
    return refused.value.reason


def assert_same(ours, theirs):
    for name in ("tasks", "label", "confidence", "has_latent", "rate_level"):
        assert getattr(theirs, name) == getattr(ours, name), name
    np.testing.assert_array_equal(ours.map, theirs.map)


@pytest.mark.parametrize("answered", [False, True])
def test_a_message_holds_tasks_answer_rate_and_latent(answered):
    for seed in range(40):
        image = named(seed, answered=answered)
        sent = write_message(image, SESSION, HELLO, TABLES, SPEC)
        found = read_message(sent.data, SESSION, HELLO, TABLES, SPEC)
        assert_same(image, found.images[0])
        assert (found.wire_bytes, found.payload_bytes) == (len(sent.data), sent.payload_bytes)
        assert sent.session_bytes == len(sent.data)


@pytest.mark.parametrize("count", [1, 3, 256])
def test_a_file_of_version_2_holds_the_same(count):
    images = [named(seed, answered=seed % 3 == 1) for seed in range(count)]
    data = write_stream(images, (32, 32), TABLES, SPEC).data
    assert data[2] == 0x20 | 2 | 8 | (count > 1)
    for ours, theirs in zip(images, read_stream(data, TABLES, SPEC).images, strict=True):
        assert_same(ours, theirs)


def test_a_message_costs_at_most_four_bytes_beside_its_latent():
    latents = []
    for seed in range(200):
        image = random_image(TASKS, SHAPE, levels=True, seed=seed, reach=1)
        first = image.tasks.primary
        sure = tuple(k == first for k in range(TASKS))
        image = replace(image, tasks=TaskField(sure, first, (0,)))
        sent = write_message(image, replace(SESSION, with_answers=False), HELLO, ONE_RATE, PLAIN)
        latents.append(len(sent.data) - sent.payload_bytes)
    assert np.mean(latents) <= 4


def test_the_size_in_a_session_is_told_of_a_file_of_one_image():
    for seed in range(20):
        image = named(seed)
        told = write_stream([image], (32, 32), TABLES, SPEC)
        sent = write_message(image, SESSION, HELLO, TABLES, SPEC)
        assert told.session_bytes == len(sent.data) == len(told.data) - 9


def test_a_reply_to_a_request_carries_no_tasks():
    session = Session((32, 32), requests=True)
    hello = write_hello(session, SPEC)
    for seed in range(40):
        image = random_image(TASKS, SHAPE, levels=False, seed=seed)
        asked = image.tasks.mask
        data = write_message(image, session, hello, ONE_RATE, PLAIN).data
        (found,) = read_message(data, session, hello, ONE_RATE, PLAIN, asked).images
        assert_same(image, found)
        alone = write_stream([image], (32, 32), ONE_RATE, PLAIN)
        assert len(data) <= alone.session_bytes
        other = (*asked[:-1], not asked[-1])
        if any(other):
            assert (
                refusal(read_message, data, session, hello, ONE_RATE, PLAIN, other)
                is Reason.CORRUPT
            )


def test_a_reply_needs_its_request_and_other_messages_take_none():
    session = Session((32, 32), requests=True)
    hello = write_hello(session, SPEC)
    image = random_image(TASKS, SHAPE, levels=False, seed=3)
    data = write_message(image, session, hello, ONE_RATE, PLAIN).data
    for asked in ((), (False,) * TASKS, (True,)):
        with pytest.raises(ValueError, match="session of requests"):
            read_message(data, session, hello, ONE_RATE, PLAIN, asked)
    data = write_message(named(0), SESSION, HELLO, TABLES, SPEC).data
    with pytest.raises(ValueError, match="session of requests"):
        read_message(data, SESSION, HELLO, TABLES, SPEC, (True,) * TASKS)


def test_no_request_passes_for_another_one_with_many_tasks():
    """A CRC is linear: over the tasks themselves 0, 4, 11 and 16 would cancel each other."""
    spec = replace(PLAIN, num_tasks=20)
    tables = random_tables("primary", 20, 3, 0)
    session = Session((32, 32), requests=True)
    hello = write_hello(session, spec)
    for seed in range(30):
        image = random_image(20, SHAPE, levels=False, seed=seed)
        field = TaskField(tuple(k in (0, 4) for k in range(20)), 4, None)
        data = write_message(replace(image, tasks=field), session, hello, tables, spec).data
        other = tuple(k in (11, 16) for k in range(20))
        assert refusal(read_message, data, session, hello, tables, spec, other) is Reason.CORRUPT


def test_messages_of_other_shapes_fail_whatever_the_shape():
    """So do those of hellos that a CRC alone would take for one another, as 256x200 and 231x318."""
    spec = replace(PLAIN, input_shape=(300, 300))
    tables = random_tables("primary", TASKS, 3, 0)
    image = random_image(TASKS, spec.latent_shape((256, 200)), levels=True, seed=0)
    first, other = (Session(shape, with_levels=True) for shape in ((256, 200), (231, 318)))
    data = write_message(image, first, write_hello(first, spec), tables, spec).data
    hello = write_hello(other, spec)
    assert refusal(read_message, data, other, hello, tables, spec) is Reason.CORRUPT


def test_a_session_of_requests_may_carry_answers_and_needs_them_then():
    session = Session((32, 32), requests=True, with_answers=True)
    hello = write_hello(session, SPEC)
    assert read_hello(hello, SPEC) == session
    for seed in range(20):
        image = named(seed, levels=False, answered=seed % 3 == 1)
        data = write_message(image, session, hello, TABLES, SPEC).data
        asked = image.tasks.mask
        assert_same(image, read_message(data, session, hello, TABLES, SPEC, asked).images[0])
    with pytest.raises(ValueError, match="each image needs both"):
        write_message(replace(image, label=None, has_latent=True), session, hello, TABLES, SPEC)


def test_the_client_may_answer_the_only_task_that_is_asked():
    session = Session((32, 32), requests=True)
    spec = replace(SPEC, confidence=())
    hello = write_hello(session, spec)
    field = TaskField((True, False, False, False, False), 0, None)
    image = CodedImage(field, np.zeros(SHAPE, np.int32), label=5, has_latent=False)
    data = write_message(image, session, hello, TABLES, spec).data
    (found,) = read_message(data, session, hello, TABLES, spec, field.mask).images
    assert_same(image, found)


def test_a_message_of_another_session_is_refused():
    data = write_message(named(4), SESSION, HELLO, TABLES, SPEC).data
    other = Session((40, 32), with_levels=True, with_answers=True)
    hello = write_hello(other, SPEC)
    assert refusal(read_message, data, other, hello, TABLES, SPEC) is Reason.CORRUPT
    assert refusal(read_message, b"\x00", SESSION, HELLO, TABLES, SPEC) is Reason.TRUNCATED
    long = replace(SPEC, max_stream_bytes=8)
    assert refusal(read_message, bytes(9), SESSION, HELLO, TABLES, long) is Reason.TOO_LARGE


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (7, 300)])
def test_a_hello_is_read_back_and_each_flipped_bit_refused(requests, shape):
    session = Session(shape, with_levels=not requests, with_answers=not requests, requests=requests)
    hello = write_hello(session, SPEC)
    assert read_hello(hello, SPEC) == session
    assert len(hello) == (11 if shape == SPEC.input_shape else 14)
    for bit in range(8 * len(hello)):
        damaged = bytearray(hello)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refusal(read_hello, bytes(damaged), SPEC) in (
            Reason.NOT_A_STREAM,
            Reason.VERSION,
            Reason.CORRUPT,
        )
    for length in range(len(hello)):
        assert refusal(read_hello, hello[:length], SPEC) in (Reason.TRUNCATED, Reason.CORRUPT)


def test_hellos_that_a_model_cannot_serve_are_refused():
    first = replace(PLAIN, version=1)
    assert refusal(write_hello, Session((32, 32)), first) is Reason.VERSION
    assert refusal(read_hello, HELLO, first) is Reason.VERSION
    assert refusal(read_hello, HELLO, PLAIN) is Reason.CORRUPT  # it sends no answers
    assert refusal(read_hello, HELLO, replace(SPEC, model_id=b"abce")) is Reason.ANOTHER_MODEL
    both = Session((32, 32), with_levels=True, requests=True)
    assert refusal(write_hello, both, SPEC) is Reason.CORRUPT
    assert refusal(write_hello, Session((0, 32)), SPEC) is Reason.CORRUPT
    assert refusal(write_hello, Session((10**4, 10**4)), SPEC) is Reason.TOO_LARGE
    assert refusal(read_hello, HELLO + bytes(20), SPEC) is Reason.TOO_LARGE


def test_files_and_hellos_are_told_apart():
    stream = write_stream([named(0)], (32, 32), TABLES, SPEC).data
    with pytest.raises(BitstreamError, match="not the hello of a session: it is a file or stream"):
        read_hello(stream[:21], SPEC)
    with pytest.raises(BitstreamError, match="not a MANTiS stream: it is the hello of a session"):
        read_stream(HELLO, TABLES, SPEC)
    with pytest.raises(BitstreamError, match="not a MANTiS stream: it begins with 0102"):
        read_stream(b"\x01\x02" + bytes(20), TABLES, SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"label": LABELS},
        {"label": None},
        {"confidence": None},
        {"confidence": 8},
        {"rate_level": 3},
        {"has_latent": False},
    ],
)
def test_what_no_reader_would_take_is_refused_by_the_writer(change):
    field = TaskField((True, False, False, True, False), 0, (1, 2))
    image = CodedImage(field, np.zeros(SHAPE, np.int32), 3, 5, rate_level=1)
    write_message(image, SESSION, HELLO, TABLES, SPEC)
    with pytest.raises(ValueError, match=r"label|confidence|rate level|levels"):
        write_message(replace(image, **change), SESSION, HELLO, TABLES, SPEC)


def test_what_cannot_be_sent_with_an_image_is_refused_and_not_dropped():
    field = TaskField(tuple(k == 1 for k in range(TASKS)), 1, (0,))
    image = CodedImage(field, np.ones(SHAPE, np.int32), confidence=3)
    with pytest.raises(ValueError, match="no label"):
        write_message(image, SESSION, HELLO, TABLES, SPEC)
    field = TaskField(tuple(k == 0 for k in range(TASKS)), 0, (0,))
    image = CodedImage(field, np.ones(SHAPE, np.int32), label=2, confidence=3)
    with pytest.raises(ValueError, match="sends no answers"):
        write_stream([image], (32, 32), ONE_RATE, PLAIN)


def test_a_task_without_labels_has_no_answer():
    field = TaskField(tuple(k == 1 for k in range(TASKS)), 1, (0,))
    image = CodedImage(field, np.ones(SHAPE, np.int32))
    data = write_message(image, SESSION, HELLO, TABLES, SPEC).data
    assert_same(image, read_message(data, SESSION, HELLO, TABLES, SPEC).images[0])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"version": 1},
        {"rate_levels": 0},
        {"rate_levels": 257},
        {"labels": ()},
        {"confidence": sure_counts(0)[:-1]},
        {"confidence": ((TOTAL - 7, *(1,) * 6, 0),) * 17},
    ],
)
def test_an_impossible_spec_is_refused(change):
    with pytest.raises(ValueError, match=r"must|need"):
        replace(SPEC, **change)


def test_what_is_appended_to_a_message_or_cut_from_it_is_refused():
    for seed in range(20):
        data = write_message(named(seed, answered=seed % 2 == 0), SESSION, HELLO, TABLES, SPEC).data
        changed = [data + bytes(zeros) for zeros in range(1, 5)]
        changed += [data + b"\xff", *(data[:length] for length in range(len(data)))]
        for damaged in changed:
            reason = refusal(read_message, damaged, SESSION, HELLO, TABLES, SPEC)
            assert reason in (Reason.CORRUPT, Reason.TRUNCATED)
