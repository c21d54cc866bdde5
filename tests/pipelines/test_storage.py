"""Storage: the same behaviour on a local folder and behind a URI, and atomic writes."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipelines.storage import (
    StorageError,
    Store,
    absolute_root,
    cache_folder,
    figures_wait,
    is_shared,
    local_root,
    private_folder,
    scratch,
    shared_scratch,
    spool_folder,
)


@pytest.fixture(params=["local", "file-uri", "remote-uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    roots = {
        "local": str(tmp_path / "root"),
        "file-uri": f"file://{tmp_path}/root",
        "remote-uri": "mock:///root",
    }
    return Store(roots[request.param])


def test_json_written_is_read_back(store: Store) -> None:
    store.write_json("a/b/result.json", {"x": [1, 2.5, None], "name": "é"})
    store.write_json("a/b/result.json", {"x": 2})
    assert store.read_json("a/b/result.json") == {"x": 2}
    assert store.list("a/b") == ["result.json"]


def test_addresses_from_join_are_accepted_as_paths(store: Store) -> None:
    address = store.join("stages", "prepare")
    store.write_bytes(f"{address}/DONE", b"yes")
    assert address.startswith(store.root)
    assert store.read_bytes("stages/prepare/DONE") == b"yes"
    assert store.exists(address)
    assert store.join(address) == address


def test_missing_things_are_reported_as_missing(store: Store) -> None:
    assert not store.exists("nothing")
    assert store.list("nothing") == []
    store.delete("nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.read_bytes("nothing")


def test_a_folder_survives_upload_and_download(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "nested").mkdir(parents=True)
    (source / "weights").write_bytes(b"\x00\x01")
    (source / "nested" / "meta").write_bytes(b"m")
    store.upload_folder(source, "checkpoint")
    copy = store.download_folder("checkpoint", tmp_path / "copy")
    assert (copy / "weights").read_bytes() == b"\x00\x01"
    assert (copy / "nested" / "meta").read_bytes() == b"m"
    store.delete("checkpoint")
    assert not store.exists("checkpoint/weights")


def test_not_a_number_is_refused_rather_than_written(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.write_json("x.json", {"loss": float("nan")})
    assert not store.exists("x.json")


def test_paths_that_leave_the_root_are_refused(store: Store) -> None:
    with pytest.raises(StorageError, match="leaves the storage root"):
        store.read_bytes("../outside")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write_bytes("file", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="disk full"):
        store.write_bytes("file", b"new")
    assert store.read_bytes("file") == b"old"
    assert store.list() == ["file"]


def test_storage_is_asked_whether_it_can_be_written_and_nothing_is_left(tmp_path: Path) -> None:
    Store(tmp_path).check_writable()
    assert Store(tmp_path).list() == []
    blocked = tmp_path / "file"
    blocked.write_text("where a folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        Store(blocked / "folder").check_writable()


def test_only_a_plain_path_is_local_and_unshared(tmp_path: Path) -> None:
    assert Store(tmp_path).local_path("a") == tmp_path / "a"
    assert Store("mock:///somewhere").local_path("a") is None
    assert not is_shared(str(tmp_path))
    assert is_shared(f"file://{tmp_path}")
    assert is_shared("s3://bucket/runs")


def test_relative_roots_resolve_against_the_given_folder() -> None:
    assert absolute_root("./runs", "/somewhere") == "/somewhere/runs"
    assert absolute_root("s3://bucket/runs/", "/somewhere") == "s3://bucket/runs"


def test_an_unknown_scheme_gets_one_clear_message() -> None:
    with pytest.raises(StorageError, match="s3://bucket/folder"):
        Store("nosuchscheme://x/y")


FULL = """
import resource, sys
from pipelines.storage import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
Store(sys.argv[1]).write_bytes("result.json", b"new" * 10_000)
"""


def test_a_full_disk_is_named_and_leaves_the_old_file_whole(tmp_path: Path) -> None:
    Store(tmp_path).write_bytes("result.json", b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    error = done.stderr.strip().splitlines()[-1]
    assert f"StorageError: {tmp_path}/result.json cannot be written (File too large)" in error
    assert Store(tmp_path).read_bytes("result.json") == b"old"
    assert Store(tmp_path).list() == ["result.json"]


def test_a_root_below_a_file_cannot_be_written_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(StorageError, match=r"runs/a/b cannot be written .* free space there"):
        Store(tmp_path / "runs").write_bytes("a/b", b"")


def test_large_temporary_files_lie_below_a_local_root_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    root = tmp_path / "root"
    with scratch(str(root), "epoch") as folder:
        (folder / "weights").write_bytes(b"w")
        assert folder.parent == root / "scratch"
    assert not folder.exists()
    (tmp_path / "tmp").mkdir()
    with scratch("memory://bucket/root", "epoch") as folder:
        assert folder.parent == tmp_path / "tmp"
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_of_temporary_files_is_named_with_what_sets_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote = rf"{tmp_path} is full: .* set TMPDIR to a folder"
    with pytest.raises(StorageError, match=remote), scratch("memory://bucket/root", "epoch"):
        raise error
    own, local = str(tmp_path / "root"), "root/scratch is full: free some space, then run"
    with pytest.raises(StorageError, match=local), scratch(own, "epoch"):
        raise error
    with pytest.raises(StorageError, match=r"^the results"), scratch(str(tmp_path), "epoch"):
        raise StorageError("the results have no room: No space left on device")


def test_a_place_for_temporary_files_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    why = r"file/scratch cannot be written \(Not a directory\)"
    with pytest.raises(StorageError, match=why), scratch(str(tmp_path / "file"), "epoch"):
        pass


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_for_all_nodes_lie_below_the_root_for_a_while(scheme: str, tmp_path: Path) -> None:
    store = Store(f"{scheme}{tmp_path}/root")
    with shared_scratch(store.root, "score") as folder:
        Store(folder).write_bytes("a/b", b"x")
        assert folder.startswith(f"{store.root}/scratch/score-")
        assert store.read_bytes(f"{folder}/a/b") == b"x"
    assert not store.exists(folder)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("s3://b/runs?endpoint_override=localhost:9000", "options behind .*AWS_ENDPOINT_URL"),
        ("s3://key:secret@b/runs", "user or a key.*AWS_ACCESS_KEY_ID"),
        ("s3://b/a#b", "options behind"),
        ("file:///tmp/what?", r"write them as %3F and %23"),
        ("s3:/b/runs", "did you mean s3://b/runs"),
        ("s3:/key:secret@b/runs", "did you mean s3://b/runs"),
        ("s3://key:secret@", "names no bucket or folder"),
        ("file:/tmp/x", r"did you mean file:///tmp/x"),
        ("s3://", "names no bucket or folder"),
        ("file://", "names no bucket or folder"),
        ("az://c/runs", "cannot be opened: .*az://c/runs"),
    ],
)
def test_a_uri_that_cannot_be_a_root_is_refused_with_the_remedy(root: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Store(root)
    assert "secret" not in str(caught.value)


def test_a_quoted_file_uri_is_one_folder_for_all(tmp_path: Path) -> None:
    root = f"file://{tmp_path}/my%20runs"
    Store(root).write_bytes("stages/a", b"")
    assert (tmp_path / "my runs/stages/a").is_file()
    assert local_root(root) == Store(root).local_path() == tmp_path / "my runs"
    assert spool_folder(root) == tmp_path / "my runs/spool"
    assert [each.name for each in tmp_path.iterdir()] == ["my runs"]


def test_figures_of_a_remote_root_wait_in_a_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = spool_folder("s3://bucket/runs")
    assert folder.is_relative_to(tmp_path / "mantis/spool")
    assert folder != spool_folder("s3://bucket/other")
    assert not figures_wait("s3://bucket/runs")
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    (folder / "key.jsonl").write_text("{}")
    assert figures_wait("s3://bucket/runs")


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(tmp_path / "spool")


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_folder() == tmp_path / f"mantis-{os.getuid()}"
