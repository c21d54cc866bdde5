"""Storage on S3: what a reader sees, how many requests it takes, and one client for a bucket."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.storage import files_below, join, open_uri, read_bytes, write_bytes
from pipelines.storage import StorageError, Store
from tests.s3 import S3, s3_environment, s3_server

ROOT = "s3://bucket/runs"
LARGE = 12 * 2**20  # bytes that no single request takes


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as started:
        yield started


@pytest.fixture
def s3(server: S3) -> Iterator[S3]:
    """The server with an empty bucket and no requests."""
    with s3_environment(server):
        Store("s3://bucket").delete("runs")
        server.requests.clear()
        yield server
        server.refused = lambda method, path: False


def test_files_and_folders_are_written_listed_measured_and_deleted(s3: S3, tmp_path: Path) -> None:
    store = Store(ROOT)
    store.check_writable()
    store.write_json("stages/a/result.json", {"x": 1})
    store.write_bytes("stages/a/b/weights.gz", b"12345")
    store.write_bytes("other", b"")
    assert store.read_json("stages/a/result.json") == {"x": 1}
    assert store.read_bytes("stages/a/b/weights.gz") == b"12345"
    assert store.list() == ["other", "stages"]
    assert store.files("stages") == ["a/b/weights.gz", "a/result.json"]
    assert store.usage("stages")[0] == len('{\n  "x": 1\n}\n') + 5
    assert store.is_folder("stages/a")
    copy = store.download_folder("stages/a", tmp_path / "copy")
    assert (copy / "b/weights.gz").read_bytes() == b"12345"
    store.delete("stages/a")
    assert not store.exists("stages/a/b/weights.gz")
    store.delete("other")
    store.delete("nothing")
    assert s3.objects() == []


def test_a_small_file_is_one_request(s3: S3) -> None:
    Store(ROOT).write_bytes("stages/a/DONE", b"x")
    write_bytes(f"{ROOT}/shards/1", b"y")
    assert s3.taken("PUT") == ["/bucket/runs/stages/a/DONE", "/bucket/runs/shards/1"]
    assert s3.taken("POST") == s3.taken("DELETE") == []


def test_a_large_file_is_read_back_whole(s3: S3) -> None:
    Store(ROOT).write_bytes("weights", b"ab" * (LARGE // 2))
    assert Store(ROOT).read_bytes("weights") == b"ab" * (LARGE // 2)


@pytest.mark.parametrize("broken", ["partNumber=1", "partNumber=2", "uploadId="])
def test_a_write_that_breaks_off_shows_nothing_of_the_new_file(s3: S3, broken: str) -> None:
    store = Store(ROOT)
    store.write_bytes("weights", b"old")
    # The last one refuses only the request that ends the upload.
    method = "POST" if broken == "uploadId=" else "PUT"
    s3.refused = lambda each, path: each == method and broken in path
    for name in ("weights", "new"):
        with pytest.raises(StorageError, match=f"^{ROOT}/{name} cannot be written"):
            store.write_bytes(name, b"x" * LARGE)
        with pytest.raises(OSError, match=f"^{ROOT}/{name} cannot be written"):
            write_bytes(f"{ROOT}/{name}", b"x" * LARGE)
    assert any(broken in path for path in s3.taken(method))
    s3.refused = lambda method, path: False
    assert s3.objects() == ["runs/weights"]
    assert store.read_bytes("weights") == b"old"


def test_a_small_write_that_is_refused_keeps_the_old_file(s3: S3) -> None:
    store = Store(ROOT)
    store.write_bytes("DONE", b"old")
    s3.refused = lambda method, path: method == "PUT"
    with pytest.raises(StorageError, match="cannot be written"):
        store.write_bytes("DONE", b"new")
    assert store.read_bytes("DONE") == b"old"


def test_a_bucket_has_one_client_until_the_environment_changes(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, inner = open_uri(f"{ROOT}/a")
    assert inner == "bucket/runs/a"
    assert open_uri("s3://bucket")[0] is Store(ROOT).filesystem is client
    with s3_server() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
        Store(ROOT).write_bytes("there", b"")
        assert other.objects() == ["runs/there"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    assert open_uri(ROOT)[0] is client
    assert s3.taken("PUT") == []


def test_a_fork_has_a_client_of_its_own(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = open_uri(ROOT)
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert open_uri(ROOT)[0] is not client


def test_a_store_can_be_sent_to_another_process(s3: S3) -> None:
    pickle.loads(pickle.dumps(Store(ROOT))).write_bytes("a", b"sent")
    assert Store(ROOT).read_bytes("a") == b"sent"


@pytest.mark.parametrize("name", ["a b", "100%25.jpg", "50%", "what?.jpg", "a#b", "é"])
def test_a_file_of_any_name_is_found_by_its_name(s3: S3, name: str, tmp_path: Path) -> None:
    for root in (f"{ROOT}/my%20images", f"file://{tmp_path}/my%20images"):
        write_bytes(join(root, name), b"x")
        assert [found.path for found in files_below(root)] == [name]
        assert read_bytes(join(root, name)) == b"x"
    assert s3.objects() == [f"runs/my images/{name}"]
