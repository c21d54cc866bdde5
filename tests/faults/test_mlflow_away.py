"""An MLflow server that is killed and comes back: figures wait, and arrive in order, once."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from mlflow import MlflowClient

from pipelines.tracking.runs import Tracker, locate_tracking
from tests.faults.harness import PATIENCE_S, Command
from tests.pipelines.experiment import paint, write_config

EPOCHS = 3


class Server:
    """A real MLflow server over sqlite on the loopback interface, which can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        store = f"sqlite:///{self.folder / 'server.db'}"
        command = ["server", "--backend-store-uri", store, "--artifacts-destination"]
        command += [str(self.folder / "artifacts"), "--host", "127.0.0.1", "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert time.monotonic() < end, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """-9, its workers too."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.uri}/health", timeout=2).ok
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_server_away_at_the_start_and_in_the_middle_gets_every_figure_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes: list[str] = []
    location = locate_tracking(server.uri, str(tmp_path))
    tracker = Tracker(location, "mantis", note=notes.append, retry_after_s=0.0)
    assert tracker.open_stage(None, "stage1", "k1", {}, folder="/runs/k1") is None
    tracker.metric_writer(None, "k1").write({"epoch": 1, "train/loss": 3.0})
    assert "does not answer" in notes[0]

    server.start()
    run_id = tracker.open_stage(None, "stage1", "k1", {}, folder="/runs/k1")
    writer = tracker.metric_writer(run_id, "k1")
    writer.retry_after_s = 0.0
    writer.write({"epoch": 2, "train/loss": 2.0})
    server.kill()
    writer.write({"epoch": 3, "train/loss": 1.0})
    writer.write({"epoch": 4, "train/loss": 0.5})
    server.start()
    writer.write({"epoch": 5, "train/loss": 0.25})
    tracker.finish(run_id, "FINISHED")
    assert run_id is not None
    history = tracker.client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == list(enumerate((3.0, 2.0, 1.0, 0.5, 0.25), 1))
    assert tracker.was_away
    assert not list((tmp_path / "spool").iterdir())


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_chain_whose_server_is_away_in_the_middle_and_at_the_end_loses_no_figure(
    server: Server, tmp_path: Path
) -> None:
    paint(tmp_path / "images", train=60)
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    training = {"epochs": EPOCHS, "batch_size": 16}
    config |= {"stage1": training, "stage2": training, "tracking": {"uri": server.uri}}
    config["evaluate"] = {"baselines": []}
    path.write_text(yaml.safe_dump(config))
    arguments = ["run", "--config", str(path)]

    server.start()
    with Command(arguments, tmp_path) as command:
        assert command.line("stage1: epoch 1/") is not None, command.output
        server.kill()
        assert command.line("stage1: ran") is not None, command.output
        server.start()
        assert command.line("stage2: epoch 1/") is not None, command.output
        server.kill()
        assert command.end(PATIENCE_S) is not None, command.output
    assert "does not answer" in command.output
    assert "evaluate: ran" in command.output
    assert command.process.returncode == 1  # a model is registered where MLflow is, or nowhere
    assert command.resume == arguments

    server.start()
    with Command(command.resume, tmp_path) as command:
        assert command.end(PATIENCE_S) is not None, command.output
    assert command.process.returncode == 0, command.output
    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    trainings = {
        run.data.tags["mantis.stage"]: client.get_metric_history(run.info.run_id, "train/loss")
        for run in runs
        if run.data.tags.get("mantis.stage") in ("stage1", "stage2")
    }
    for history in trainings.values():
        assert [metric.step for metric in history] == list(range(1, EPOCHS + 1))
    assert len(trainings) == 2
    assert not list((tmp_path / "runs/spool").iterdir())
