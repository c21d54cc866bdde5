"""The commands on finished runs: which store they read, what they say, and that they write none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.chain.run import make_tracker
from pipelines.settings.reading import load_settings
from pipelines.terminal.console import Console
from pipelines.tracking.runs import Tracker, locate_tracking
from tests.pipelines.fakes import same_code
from tests.root import ROOT

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train, training: {batch_size: 4}}
stage1: {batch_size: 4}
stage2: {batch_size: 4}
"""


def mantis(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which no variable names a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return tmp_path


def make_root(folder: Path, template: Path, *experiments: str) -> dict[str, str]:
    """A root with a store and a pipeline run in each experiment. Returns their ids."""
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    found = {}
    for name in experiments:
        tracker = Tracker(locate_tracking(None, str(folder)), name)
        found[name] = str(tracker.open_pipeline("tiny", {}, f"plan-{name}"))
    return found


def experiments(root: Path) -> list[str]:
    client = Tracker(locate_tracking(None, str(root)), "mantis").client
    return sorted(each.name for each in client.search_experiments())


def test_looking_finds_runs_of_any_experiment_and_creates_none(
    home: Path, mlflow_template: Path
) -> None:
    runs = make_root(home / "runs", mlflow_template, "cars", "pets")
    before = experiments(home / "runs")
    found = json.loads(mantis("lineage", "--json").stdout)
    assert found["run_id"] == runs["pets"]
    found = json.loads(mantis("lineage", "latest", "--experiment", "cars", "--json").stdout)
    assert found["run_id"] == runs["cars"]
    for command in ("report", "register", "lineage"):
        done = mantis(command, "latest", "--experiment", "birds")
        assert done.exit_code == 2
        assert "experiment 'birds'" in done.stderr
        assert "have runs: cars, pets" in done.stderr
    assert mantis("models").exit_code == 0
    assert experiments(home / "runs") == before
    assert "mantis" not in before


def test_the_variables_name_the_store_and_the_experiment_and_a_root_beats_them(
    home: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_root(home / "runs", mlflow_template, "pets")
    there = make_root(home / "there", mlflow_template, "cars", "pets")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/there/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cars")
    assert json.loads(mantis("lineage", "--json").stdout)["run_id"] == there["cars"]
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    found = mantis("lineage", "--root", home / "runs", "--json").stdout
    assert json.loads(found)["run_id"] == here["pets"]


def test_run_and_lookups_take_the_same_store(
    home: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_code(monkeypatch)
    monkeypatch.setattr("pipelines.chain.preflight.Preflight.check", lambda *_: [])
    (home / "tiny.yaml").write_text(CONFIG)
    shutil.copy(mlflow_template, home / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/other.db")
    tracker = make_tracker(load_settings(home / "tiny.yaml"), Console(sys.stderr, live=False))
    run_id = tracker.open_pipeline("tiny", {}, "plan")
    assert json.loads(mantis("lineage", "--json").stdout)["run_id"] == run_id
    assert not (home / "runs").exists()
    shown = mantis("run", "--config", "tiny.yaml", "--dry-run").stdout
    assert f"MLflow: sqlite:///{home}/other.db, experiment mantis, model mantis" in shown


@pytest.mark.parametrize("command", ["models", "lineage", "report", "register"])
def test_a_store_that_is_not_there_is_named_and_not_made(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    done = mantis(command)
    assert done.exit_code == 2
    assert f"there are no runs in {home}/runs: {home}/runs/mlflow.db does not exist" in done.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/other.db")
    done = mantis(command)
    assert f"no runs in {home}/other.db, which MLFLOW_TRACKING_URI names" in done.stderr
    (home / "other.db").touch()
    assert "it is empty" in mantis(command).stderr
    assert sorted(path.name for path in home.iterdir()) == ["other.db"]
    assert (home / "other.db").stat().st_size == 0


def test_runs_recorded_in_another_store_are_said_to_be_there(home: Path) -> None:
    (home / "runs/plans").mkdir(parents=True)
    (home / "runs/plans/one.json").write_text('{"store": "http://me:***@host:5000"}')
    done = mantis("models")
    assert "recorded in http://me:***@host:5000: set MLFLOW_TRACKING_URI" in done.stderr


@pytest.mark.parametrize("uri", ["./mlruns", "file:./mlruns", "databricks"])
def test_a_variable_that_names_no_store_is_one_message(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = mantis("models")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: MLFLOW_TRACKING_URI is '{uri}'; its scheme must be")


def test_an_empty_variable_is_none(
    home: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert mantis("models").exit_code == 2
    assert list(home.iterdir()) == []
    make_root(home / "runs", mlflow_template, "pets")
    assert mantis("lineage").exit_code == 0


AWAY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "command",
    [
        ("models",),
        ("report",),
        ("lineage",),
        ("register",),
        ("promote", "1"),
        ("encode", "models:/mantis@candidate", "a.jpg", "-o", "a.mts"),
    ],
)
def test_a_server_that_is_away_is_one_message(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (home / "a.jpg").touch()
    done = mantis(*command)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: MLflow at {AWAY} does not answer")
    assert "no model" not in done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_port_in_use_is_said(home: Path, mlflow_template: Path) -> None:
    make_root(home / "runs", mlflow_template)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = mantis("ui", "--port", port)
    assert done.exit_code == 2
    assert f"error: port {port} cannot be used (Address already in use): give --port" in done.stderr


def test_a_server_needs_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert mantis("ui").stdout == "MLflow serves its pages at http://host:5000\n"


@pytest.fixture
def ui(home: Path, mlflow_template: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    make_root(home / "runs", mlflow_template, "pets")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "ui", "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, port
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_pages_are_served_until_ctrl_c(ui: tuple[subprocess.Popen[str], int]) -> None:
    process, port = ui
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"MLflow's pages are at http://127.0.0.1:{port}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
        assert b"MLflow" in page.read()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
