"""Files by path or URI: what cannot be opened is one message, without the user's secrets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.finding import source_for_path
from data_prep.manifest import read_manifest
from data_prep.sources.kinds import SOURCES
from data_prep.storage import AHEAD, THREADS, absolute, filesystem, in_threads, uri_fault

DATA = DataConfig(sources=({"kind": "shapes"},))
SECRET = "s3://key:hidden@bucket/images"


@pytest.mark.parametrize("uri", ["az://c/photos", "nosuch://x/y", "file://host/x"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(
        DataError, match=rf"^{uri} cannot be opened \(.*give a local path or a URI of s3"
    ):
        filesystem(uri)


@pytest.mark.parametrize("take", [absolute, read_manifest, lambda uri: source_for_path(uri, DATA)])
@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        (SECRET, "AWS_SECRET_ACCESS_KEY"),
        ("s3://key:hidden@", "names no bucket"),
        ("s3://key:hidden@bucket/a?region=x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/images?endpoint_override=localhost:9000&token=hidden", "AWS_ENDPOINT_URL"),
        ("s3://bucket?secret=hidden", "AWS_ENDPOINT_URL"),
        ("abfs://container:hidden@account/images", "leave it out"),
    ],
)
def test_options_and_keys_in_a_uri_are_refused_and_not_repeated(
    take: Callable[[str], Any], uri: str, remedy: str
) -> None:
    with pytest.raises(DataError, match=remedy) as caught:
        take(uri)
    assert "hidden" not in str(caught.value)
    assert "key" not in str(caught.value).partition("is given")[0]


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket", "gs://bucket/a%3Fb", "abfs://container@account/images", "file:///a/b%23c"],
)
def test_a_plain_uri_is_taken(uri: str) -> None:
    assert uri_fault(uri) == ""
    assert absolute(f"{uri}/") == uri


def test_threads_keep_the_order_and_do_not_run_far_ahead() -> None:
    begun = []

    def square(number: int) -> int:
        begun.append(number)
        return number**2

    found = in_threads(square, range(1000))
    assert [next(found) for _ in range(10)] == [number**2 for number in range(10)]
    assert len(begun) <= 10 + AHEAD * THREADS
    assert list(found) == [number**2 for number in range(10, 1000)]
    assert sorted(begun) == list(range(1000))


def test_threads_wait_at_once() -> None:
    both = threading.Barrier(THREADS, timeout=60)  # it opens when all of them wait
    assert list(in_threads(lambda item: both.wait() >= 0, range(THREADS))) == [True] * THREADS


def test_the_error_of_the_first_bad_item_in_the_order_is_raised() -> None:
    later = threading.Event()

    def fail(number: int) -> int:
        if number == 7:
            assert later.wait(60)
        if number == 9:
            later.set()
        if number in (7, 9):
            raise DataError(f"file {number} is bad")
        return number

    found = in_threads(fail, range(1000))
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError, match="file 7 is bad"):
        next(found)


PLACES = ("path", "train", "val", "train_folder", "val_folder", "train_labels", "val_labels")


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind, of in SOURCES.items() for field in of.model_fields if field in PLACES],
)
def test_no_source_takes_a_place_with_a_key(kind: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: s3://bucket/images.* AWS_ACCESS_KEY_ID") as e:
        SOURCES[kind](kind=kind, **{field: f"{SECRET}/x-*.y"})
    said = str(e.value).partition("[type=value_error")[0]  # pydantic adds the input
    assert "hidden" not in said
