"""The log of a command below a remote root: what it holds, while the command runs and after it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipelines.storage import StorageError, Store
from pipelines.terminal import kept_log
from pipelines.terminal.kept_log import copied, log_name


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "2026-11-29.log"
    path.write_text("an earlier command\n")
    return path


def append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def test_the_copy_grows_with_the_command_and_holds_nothing_of_others(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_log, "INTERVAL_S", 0.05)
    store = Store(f"file://{tmp_path}/bucket")
    with copied(log, store, "name.log"):
        append(log, "first\n")
        end = time.monotonic() + 20
        while not store.exists("logs/name.log"):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert store.read_bytes("logs/name.log") == b"first\n"
        append(log, "last\n")
    assert store.read_bytes("logs/name.log") == b"first\nlast\n"


def test_an_error_of_the_command_is_in_the_copy(log: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/bucket")

    def command() -> None:
        append(log, "Traceback of boom\n")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"), copied(log, store, "name.log"):
        command()
    assert store.read_bytes("logs/name.log") == b"Traceback of boom\n"


def test_a_root_that_cannot_be_written_costs_a_warning_not_the_run(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"file://{tmp_path}/bucket")

    def refuse(path: str, data: bytes) -> None:
        raise StorageError("the bucket refuses")

    with monkeypatch.context() as away:
        away.setattr(store, "write_bytes", refuse)
        with copied(log, store, "name.log"):
            append(log, "first\n")
    assert "cannot be copied to logs/name.log: the bucket refuses" in caplog.text


def test_what_a_root_refused_is_written_once_it_is_back(log: Path, tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("in the way")
    store = Store(f"file://{tmp_path}/bucket")
    copy = kept_log._Copy(log, store, "logs/name.log")
    append(log, "first\n")
    copy.write()
    (tmp_path / "bucket").unlink()
    copy.write()
    assert store.read_bytes("logs/name.log") == b"first\n"


def test_the_name_says_when_where_and_by_which_process() -> None:
    assert log_name().startswith("20")
    assert log_name().endswith(".log")
    assert "/" not in log_name()
