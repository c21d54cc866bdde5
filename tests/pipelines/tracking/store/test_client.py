"""A store that is away, damaged, of another schema or oddly named, and what is said of it."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

from pipelines.settings.tracking import sqlite_uri
from pipelines.tracking import lookup
from pipelines.tracking.runs import Tracker, locate_tracking
from pipelines.tracking.store import client as store
from pipelines.tracking.store.client import (
    TRANSFER_TIMEOUT_S,
    TrackingError,
    asking,
    check_access,
    explain,
    sqlite_file,
    transferring,
)
from tests.root import ROOT

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


KILLED = """
import os, signal, sys
from pathlib import Path
from alembic.runtime.migration import HeadMaintainer
from pipelines.settings.tracking import sqlite_uri
from pipelines.tracking.store.client import bounded_client

left, whole = int(sys.argv[2]), HeadMaintainer.update_to_step

def step(self, migration):
    global left
    whole(self, migration)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

HeadMaintainer.update_to_step = step
bounded_client(sqlite_uri(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("steps", [1, 12])
def test_a_store_whose_creation_was_killed_is_created_by_the_next_command(
    root: Path, steps: int
) -> None:
    file = root / "mlflow.db"
    command = [sys.executable, "-c", KILLED, str(file), str(steps)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not file.exists()
    assert (root / "mlflow.db.partial").exists()
    with asking(sqlite_uri(file)) as client:
        assert client.create_experiment("after the kill")
    left = {path.name for path in root.iterdir()}
    assert left == {"mlflow.db", "mlflow.db.lock"}


def test_a_store_that_is_a_link_to_nothing_is_created_where_it_points(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (root / "mlflow.db").symlink_to(tmp_path / "disk" / "real.db")
    with asking(sqlite_uri(root / "mlflow.db")) as client:
        client.create_experiment("there")
    assert (root / "mlflow.db").is_symlink()
    assert (tmp_path / "disk" / "real.db").stat().st_size


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


class Answering(BaseHTTPRequestHandler):
    """An MLflow server that stores a file in two seconds, and refuses whoever asks for runs."""

    stored: ClassVar[list[str]] = []
    text = b"Invalid Host header - possible DNS rebinding attack detected"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(2)
        self.stored.append(self.path)
        self._answer(200)

    def do_GET(self) -> None:
        self._answer(403)

    do_POST = do_GET

    def _answer(self, status: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # a client that did not wait
            self.send_response(status)
            self.send_header("Content-Length", str(len(self.text)))
            self.end_headers()
            self.wfile.write(self.text)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_a_file_may_take_longer_than_a_call(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "weights").write_bytes(b"w")
    files = HttpArtifactRepository(f"{server}/api/2.0/mlflow-artifacts/artifacts/1")
    with pytest.raises(MlflowException, match=r"(?i)timed out|timeout"):
        files.log_artifact(str(tmp_path / "weights"))
    with transferring():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == str(TRANSFER_TIMEOUT_S)
        files.log_artifact(str(tmp_path / "weights"))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    assert Answering.stored[-1].endswith("/weights")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1800")
    with transferring():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1800"
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    with transferring():
        pass
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_every_file_is_sent_and_fetched_with_that_patience() -> None:
    names = {"log_artifacts", "log_artifact", "log_model_artifacts", "download_artifacts"}
    patient, all_of_them = set(), set()
    for path in (ROOT / "pipelines").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node) in names:
                all_of_them.add((path.name, node.lineno))
            if isinstance(node, ast.With) and any(
                isinstance(item.context_expr, ast.Call)
                and _name(item.context_expr) == "transferring"
                for item in node.items
            ):
                inside = (each for each in ast.walk(node) if isinstance(each, ast.Call))
                patient |= {(path.name, c.lineno) for c in inside if _name(c) in names}
    assert len(all_of_them) == 4
    assert patient == all_of_them


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@pytest.mark.parametrize("text", [Answering.text, b'{"error_code": "PERMISSION_DENIED"}'])
def test_a_server_that_refuses_is_told_before_any_work(
    server: str, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "text", text)
    with pytest.raises(TrackingError, match=r"refuses this client.*allowed-hosts; tracking\.en"):
        check_access(server)
    check_access("sqlite:////nowhere/mlflow.db")


def test_a_server_that_is_away_at_the_start_is_asked_once(tmp_path: Path) -> None:
    notes: list[str] = []
    tracker = Tracker(locate_tracking(NOWHERE, str(tmp_path)), "mantis", note=notes.append)
    tracker.check_access()
    assert tracker.was_away
    assert "does not answer" in notes[0]
    assert tracker.open_pipeline("tiny", {}, "key") is None
    assert len(notes) == 1
