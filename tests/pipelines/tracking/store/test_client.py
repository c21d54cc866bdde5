"""A store that is away, damaged, of another schema or oddly named, and what is said of it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipelines.settings.tracking import sqlite_uri
from pipelines.tracking import lookup
from pipelines.tracking.runs import Tracker, locate_tracking
from pipelines.tracking.store import client as store
from pipelines.tracking.store.client import (
    TrackingError,
    asking,
    explain,
    sqlite_file,
)

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["plain", "a%20b", "what?", "r#1", "ünï runs", "100% runs"])
def test_the_uri_of_a_file_leads_back_to_it(name: str) -> None:
    file = Path("/data") / name / "mlflow.db"
    assert sqlite_file(sqlite_uri(file)) == file


@pytest.mark.parametrize("name", ["a%20b", "what?"])
def test_a_root_of_an_odd_name_holds_its_store_and_its_artifacts(
    mlflow_template: Path, tmp_path: Path, name: str
) -> None:
    root = tmp_path / name
    root.mkdir()
    shutil.copy(mlflow_template, root / "mlflow.db")
    tracker = Tracker(locate_tracking(None, str(root)), "mantis")
    run_id = tracker.open_pipeline("tiny", {}, "plan")
    assert run_id is not None
    tracker.client.log_text(run_id, "hello", "note.txt")
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("select name from experiments where name='mantis'").fetchall()
    assert [file.name for file in (root / "mlartifacts").rglob("*.txt")] == ["note.txt"]
    assert [each.name for each in tmp_path.iterdir()] == [name]


def damaged(file: Path) -> None:
    file.write_text("this is a text and no database " * 100)


def of_something_else(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("create table birds (name text)")


def older(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("drop table logged_models")


def of_another_version(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("update alembic_version set version_num = '0000'")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "cannot be read as an MLflow store"),
        (of_something_else, "tables of something else"),
        (older, "mlflow db upgrade sqlite:///"),
        (of_another_version, "mlflow db upgrade sqlite:///"),
    ],
)
def test_a_file_that_is_no_store_of_this_mlflow_is_named_and_left_as_it_is(
    root: Path, mlflow_template: Path, harm: Callable[[Path], None], message: str
) -> None:
    file = root / "mlflow.db"
    if harm in (older, of_another_version):
        shutil.copy(mlflow_template, file)
    harm(file)
    before = content(file)
    notes: list[str] = []
    tracker = Tracker(locate_tracking(None, str(root)), "mantis", note=notes.append)
    with pytest.raises(TrackingError, match=message):
        lookup.find_pipeline(tracker, "latest")
    assert tracker.open_pipeline("tiny", {}, "plan") is None
    assert message in notes[0]
    assert str(file) in notes[0]
    assert content(file) == before


def content(file: Path) -> object:
    """The bytes of a file, or the tables and rows of a database."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            return list(database.iterdump())
    except sqlite3.DatabaseError:
        return file.read_bytes()


def test_a_database_server_is_asked_for_seconds_and_its_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "create_engine", lambda *_, **__: None)
    uri = "postgresql://me:secret@127.0.0.1:9/db"
    with (
        pytest.raises(TrackingError, match=r"does not answer \(127\.0\.0\.1:9: ") as caught,
        asking(uri),
    ):
        pytest.fail("nothing listens there")
    assert "secret" not in str(caught.value)


def test_a_missing_driver_is_named() -> None:
    with (
        pytest.raises(TrackingError, match=r"driver that is not installed .*psycopg"),
        asking("postgresql://h/db"),
    ):
        pytest.fail("there is no driver")


def test_a_server_that_is_away_is_one_message(tmp_path: Path) -> None:
    tracker = Tracker(locate_tracking(NOWHERE, str(tmp_path)), "mantis")
    for run in ("latest", "0" * 32):
        with pytest.raises(TrackingError, match=f"MLflow at {NOWHERE} does not answer"):
            lookup.find_pipeline(tracker, run)


def test_other_errors_pass(root: Path, mlflow_template: Path) -> None:
    shutil.copy(mlflow_template, root / "mlflow.db")
    with pytest.raises(ZeroDivisionError), asking(f"sqlite:///{root}/mlflow.db"):
        raise ZeroDivisionError


def test_after_a_failure_mlflow_is_left_alone_until_asked_again(tmp_path: Path) -> None:
    calls = []

    def fail() -> None:
        calls.append("called")
        raise MlflowException("down")

    tracker = Tracker(locate_tracking(NOWHERE, str(tmp_path)), "mantis", note=lambda _: None)
    for _ in range(3):
        assert tracker.attempt(fail) is None
    assert len(calls) == 1
    tracker.ask_again()
    assert tracker.attempt(lambda: 3) == 3
    assert tracker.was_away
    assert tracker.available


def test_an_answer_that_refuses_one_call_does_not_stop_the_next(tmp_path: Path) -> None:
    def refuse() -> None:
        raise MlflowException("no such field", error_code=1000)  # INVALID_PARAMETER_VALUE

    tracker = Tracker(locate_tracking(NOWHERE, str(tmp_path)), "mantis", note=lambda _: None)
    assert tracker.attempt(refuse) is None
    assert tracker.attempt(lambda: 3) == 3


def test_a_long_message_of_a_remedy_is_not_cut(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/{'x' * 150}/mlflow.db"
    error = MlflowException("Detected out-of-date database schema (found version 0000)")
    assert f"`mlflow db upgrade {uri}`" in explain(error, uri)


def test_a_server_that_refuses_is_not_called_away() -> None:
    error = MlflowException("API request to /api failed with error code 403 != 200. Invalid Host")
    assert "refuses this client (API request" in explain(error, NOWHERE)
    assert "--allowed-hosts" in explain(error, NOWHERE)


FIRST_RUN = """
import sys
from pipelines.tracking.runs import Tracker, locate_tracking
tracker = Tracker(locate_tracking(None, sys.argv[1]), "mantis", note=sys.exit)
assert tracker.open_pipeline("tiny", {}, sys.argv[2])
"""


@pytest.mark.slow
def test_two_first_runs_at_once_both_end_well(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FIRST_RUN, str(tmp_path / "runs")]
    both = [
        subprocess.Popen([*command, plan], stderr=subprocess.PIPE, text=True)
        for plan in ("one", "two")
    ]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert [code for _, code in ends] == [0, 0], ends
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)
