"""Whole streams without networks: one image or several, sizes, caps, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.container import BitstreamError, Reason, StreamSpec, pack, unpack
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import CodedImage, read_stream, write_stream

TASKS = 10


def tables_of(prior, channels=8, seed=0):
    """Tables as training makes them: narrow around zero, with an escape."""
    rng = np.random.default_rng(seed)
    rows = 1 if prior == "shared" else TASKS
    symbols = np.arange(-8, 9)
    cdf = np.zeros((rows, channels, len(symbols) + 2), np.int32)
    for row in range(rows):
        for channel in range(channels):
            mass = np.exp(-np.abs(symbols) / rng.uniform(0.2, 2))
            counts = np.maximum(1, np.floor(mass / mass.sum() * (TOTAL - 64))).astype(int)
            counts = np.append(counts, 1)
            counts[8] += TOTAL - counts.sum()
            cdf[row, channel, 1:] = np.cumsum(counts)
    shape = np.full(channels, symbols[0], np.int32), np.full(channels, len(symbols) + 1, np.int32)
    return TableSet(prior, cdf, *shape)


SPEC = StreamSpec(
    b"abcd", TASKS, (64, 64), 8, 8, max_pixels=16 * 64 * 64, max_total_pixels=256 * 64 * 64
)


def images_of(count, seed=0, shape=(8, 8, 8), levels=True):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        active = np.sort(rng.choice(TASKS, rng.integers(1, 5), replace=False))
        primary = int(rng.choice(active))
        least = int(rng.integers(0, 8))
        own = tuple(least if k == primary else int(rng.integers(least, 16)) for k in active)
        mask = tuple(bool(k in active) for k in range(TASKS))
        symbols = np.rint(rng.laplace(0, 0.6, shape)).astype(np.int32)
        images.append(CodedImage(TaskField(mask, primary, own if levels else None), symbols))
    return images


@pytest.mark.parametrize("prior", ["shared", "per_task", "primary"])
@pytest.mark.parametrize("count", [1, 2, 5, 256])
@pytest.mark.parametrize("levels", [True, False])
def test_what_is_written_is_read(prior, count, levels):
    tables = tables_of(prior)
    images = images_of(count, levels=levels)
    data, payload_bytes, _ = write_stream(images, (64, 64), tables, SPEC)
    found = read_stream(data, tables, SPEC)
    assert (found.input_shape, found.wire_bytes) == ((64, 64), len(data))
    assert found.payload_bytes == pytest.approx(payload_bytes)
    for ours, theirs in zip(images, found.images, strict=True):
        assert ours.tasks == theirs.tasks
        np.testing.assert_array_equal(ours.map, theirs.map)


def test_images_of_another_shape_carry_it():
    images = images_of(2, shape=(8, 3, 10))
    tables = tables_of("primary")
    data, *_ = write_stream(images, (20, 75), tables, SPEC)
    assert read_stream(data, tables, SPEC).input_shape == (20, 75)


def test_a_latent_of_other_channels_than_the_models_is_refused_by_the_writer():
    for channels in (7, 9):
        (image,) = images_of(1, shape=(channels, 8, 8))
        with pytest.raises(ValueError, match="must be"):
            write_stream([image], (64, 64), tables_of("shared", channels), SPEC)


def ideal_bytes(image, tables):
    table = tables.table_for(image.tasks.mask, image.tasks.primary)
    entries = image.map.reshape(len(table.offsets), -1) - table.offsets[:, None]
    assert ((entries >= 0) & (entries < table.lengths[:, None] - 1)).all()
    counts = np.take_along_axis(np.diff(table.cdf, axis=1), entries, axis=1)
    return -np.log2(counts / TOTAL).sum() / 8


def test_a_stream_of_one_costs_14_bytes_beside_its_payload_at_most():
    tables = tables_of("primary")
    for image in images_of(200):
        data, payload_bytes, _ = write_stream([image], (64, 64), tables, SPEC)
        ideal = ideal_bytes(image, tables)
        assert payload_bytes <= ideal * 1.001 + 2
        assert len(data) <= ideal * 1.001 + 2 + 14


def test_together_images_cost_under_three_bytes_each_beside_their_payload():
    tables = tables_of("primary")
    images = images_of(256)
    data, payload_bytes, _ = write_stream(images, (64, 64), tables, SPEC)
    assert payload_bytes == pytest.approx(sum(ideal_bytes(i, tables) for i in images), rel=1e-3)
    assert (len(data) - payload_bytes) / len(images) <= 3


def test_more_images_or_pixels_than_a_stream_may_hold_are_refused_by_the_writer():
    tables = tables_of("shared")
    for images, shape in [
        (images_of(257), (64, 64)),
        (images_of(17, shape=(8, 32, 32)), (256, 256)),
    ]:
        with pytest.raises(BitstreamError) as refused:
            write_stream(images, shape, tables, SPEC)
        assert refused.value.reason is Reason.TOO_LARGE


def test_a_stream_without_images_or_of_two_kinds_is_refused_by_the_writer():
    tables = tables_of("shared")
    with pytest.raises(BitstreamError, match="no pixel"):
        write_stream([], (64, 64), tables, SPEC)
    with pytest.raises(ValueError, match="some do not"):
        write_stream([*images_of(1), *images_of(1, levels=False)], (64, 64), tables, SPEC)
    with pytest.raises(ValueError, match="must be"):
        write_stream(images_of(1), (64, 72), tables, SPEC)


def test_a_claim_of_more_images_than_there_are_is_corrupt():
    tables = tables_of("primary")
    stream = unpack(write_stream(images_of(3), (64, 64), tables, SPEC).data, SPEC)
    for count in (2, 4, 256):
        forged = pack(replace(stream, num_images=count), SPEC)
        with pytest.raises(BitstreamError) as refused:
            read_stream(forged, tables, SPEC)
        assert refused.value.reason is Reason.CORRUPT


def test_levels_that_are_claimed_or_denied_falsely_are_another_content_or_corrupt():
    tables = tables_of("primary")
    accepted = 0
    for seed in range(20):
        images = images_of(1, seed=seed, levels=bool(seed % 2))
        stream = unpack(write_stream(images, (64, 64), tables, SPEC).data, SPEC)
        forged = pack(replace(stream, with_levels=not stream.with_levels), SPEC)
        try:
            found = read_stream(forged, tables, SPEC)
        except BitstreamError:
            continue
        accepted += 1
        assert write_stream(found.images, (64, 64), tables, SPEC).data == forged
    assert accepted < 10


def answered(task: int, label: int | None, levels: tuple[int, ...] | None = (3,)) -> CodedImage:
    field = TaskField(tuple(k == task for k in range(TASKS)), task, levels)
    return CodedImage(field, np.zeros((8, 8, 8), np.int32), label, has_latent=label is None)


ANSWERABLE = replace(SPEC, labels=(7, 0, 1, *(5,) * (TASKS - 3)))


@pytest.mark.parametrize(("task", "label"), [(0, 0), (0, 6), (2, 0), (3, 4)])
def test_a_clients_own_answer_is_read_and_takes_two_bytes_at_most(task, label):
    tables = tables_of("primary", 8)
    sent = answered(task, label)
    data, payload_bytes, _ = write_stream([sent], (64, 64), tables, ANSWERABLE)
    (found,) = read_stream(data, tables, ANSWERABLE).images
    assert (found.label, found.tasks) == (label, sent.tasks)
    assert not found.map.any()
    assert len(data) <= 11 + 2
    assert payload_bytes < 1


def test_answered_images_stand_beside_others_in_one_stream():
    tables = tables_of("primary", 8)
    images = images_of(6)
    images[2:2] = [answered(0, 5), answered(4, 1)]
    images.append(answered(0, None))
    data, *_ = write_stream(images, (64, 64), tables, ANSWERABLE)
    found = read_stream(data, tables, ANSWERABLE).images
    assert [image.label for image in found] == [image.label for image in images]
    for ours, theirs in zip(images, found, strict=True):
        np.testing.assert_array_equal(ours.map, theirs.map)


@pytest.mark.parametrize(
    ("image", "spec"),
    [
        (answered(0, 7), ANSWERABLE),
        (answered(1, 0), ANSWERABLE),
        (answered(0, 0), SPEC),
        (replace(images_of(1, seed=3)[0], label=0), ANSWERABLE),
    ],
    ids=["no such label", "a task without labels", "a client that names no classes", "two tasks"],
)
def test_an_answer_that_no_reader_would_take_is_refused_by_the_writer(image, spec):
    with pytest.raises(ValueError, match="label"):
        write_stream([image], (64, 64), tables_of("primary", 8), spec)
