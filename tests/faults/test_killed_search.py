"""Kill -9 of a trial's worker, the raylet, the driver: the search, or --resume, goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from pipelines.search.journal import Journal
from pipelines.storage import Store
from tests.pipelines.experiment import last_json, mantis, paint, write_config

TRIALS, EPOCHS = 3, 4


@pytest.fixture
def experiment(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with images and a config, and the search over it."""
    paint(tmp_path / "images", train=130)
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["cluster"] = {"workers": 1, "threads_per_worker": 1}
    config["stage2"]["epochs"] = EPOCHS
    config["tune"] = {"stop_early": False}
    path.write_text(yaml.safe_dump(config))
    return tmp_path, [
        "tune", "--config", str(path), "--space", "film", "--trials", str(TRIALS),
    ]  # fmt: skip


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
    )


def until(driver: subprocess.Popen[str], beginning: str) -> None:
    assert driver.stdout is not None
    told = []
    for line in driver.stdout:
        told.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError("".join(told))


def children(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Processes of a driver's own Ray whose command line begins with `name`."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if line.startswith(name) or f"/{name}" in line.split(" ")[0]:
            found.append(process)
    return found


def journal(folder: Path) -> Journal:
    (place,) = (folder / "runs/searches").iterdir()
    return Journal(Store(folder / "runs"), f"searches/{place.name}")


def check_resumed(folder: Path, command: list[str], before: Journal) -> Any:
    """Resumes, and checks that finished trials were not run again and the front has all."""
    stages = folder / "runs/stages"
    stamps = {path: path.stat().st_mtime for path in stages.glob("stage2-*/DONE")}
    result = last_json(mantis(*command, "--resume", "--json", folder=folder))
    assert result["trials"]["finished"] == TRIALS
    assert result["failed"] == {}
    assert {path: path.stat().st_mtime for path in stamps} == stamps
    after = journal(folder)
    for number, record in before.trials.items():
        if record.state != "running":
            assert after.trials[number] == record
        assert after.trials[number].params == record.params
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    experiment = client.get_run(result["run_id"]).info.experiment_id
    runs = client.search_runs([experiment])
    assert sum("mantis.search_key" in run.data.tags for run in runs) == 1
    assert sorted(
        run.data.tags.get("mantis.trial", "") for run in runs if "mantis.trial" in run.data.tags
    ) == [str(number) for number in range(TRIALS)]
    for run in runs:
        assert run.info.status == "FINISHED"
        if run.data.tags.get("mantis.stage") == "stage2":
            history = client.get_metric_history(run.info.run_id, "train/loss")
            assert [metric.step for metric in history] == list(range(1, EPOCHS + 1))
    return result


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_killed_worker_costs_an_epoch_at_most_and_no_trial(
    experiment: tuple[Path, list[str]],
) -> None:
    folder, command = experiment
    told, killed = [], False
    with start(folder, [*command, "--json"]) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            told.append(line)
            if line.startswith("trial 1: epoch 1/") and not killed:
                workers = children(driver, "ray::RayTrainWorker")
                assert workers
                for worker in workers:
                    worker.kill()
                killed = True
    assert driver.returncode == 0, "".join(told)[-3000:]
    assert killed
    record = journal(folder).trials[1]
    assert (record.state, sorted(record.epochs)) == ("finished", list(range(1, EPOCHS + 1)))


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["raylet", "driver"])
def test_what_ends_the_search_costs_no_finished_trial(
    experiment: tuple[Path, list[str]], victim: str
) -> None:
    folder, command = experiment
    with start(folder, command) as driver:
        until(driver, "trial 1: epoch 1/")
        raylets = children(driver, "raylet")
        assert raylets
        for process in raylets if victim == "raylet" else [driver]:
            process.kill()
        driver.communicate(timeout=300)
    assert driver.returncode != 0
    check_resumed(folder, command, journal(folder))
