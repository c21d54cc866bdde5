"""A whole search as a user runs it: real Ray Tune, Ray Train, MLflow, streams, registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.search.journal import Journal
from pipelines.storage import Store
from tests.pipelines.experiment import last_json, mantis, paint, write_config
from tests.root import ROOT

pytestmark = pytest.mark.slow
TRIALS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A folder in which a search over FiLM sizes has run, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    paint(folder / "images", train=24)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["cluster"] = {"workers": 1, "threads_per_worker": 1}
    config["stage2"]["epochs"] = 2
    path.write_text(yaml.safe_dump(config))
    command = ("tune", "--config", str(path), "--space", "film", "--trials", str(TRIALS))
    result = last_json(mantis(*command, "--register", "--json", folder=folder))
    return folder, path, result


@pytest.mark.timeout(900)
def test_a_search_shares_stage_1_and_leaves_a_front(finished: tuple[Path, Path, Any]) -> None:
    folder, _, result = finished
    assert result["trials"]["finished"] == TRIALS
    assert result["concurrent"] == 1
    assert result["failed"] == {}
    assert result["stage1_configs"] == 1
    assert result["epochs"] == 2 * TRIALS
    assert len(list((folder / "runs/stages").glob("stage1-*"))) == 1
    assert len(list((folder / "runs/stages").glob("stage2-*"))) == TRIALS
    assert result["front"]
    assert 0 <= result["overhead"] < 1
    for name in ("front.csv", "trials.csv", "search.json", "search.png", "search.html"):
        assert (Path(result["folder"]) / name).stat().st_size > 0
    store = Store(folder / "runs")
    journal = Journal(store, str(Path(result["folder"]).relative_to(folder / "runs")))
    assert [record.state for record in journal.trials.values()] == ["finished"] * TRIALS
    assert all(sorted(record.epochs) == [1, 2] for record in journal.trials.values())


@pytest.mark.timeout(900)
def test_mlflow_has_the_search_its_trials_and_their_stages(
    finished: tuple[Path, Path, Any],
) -> None:
    folder, _, result = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    volumes = client.get_metric_history(result["run_id"], "search/hypervolume")
    assert [metric.step for metric in volumes] == list(range(1, TRIALS + 1))
    assert "front.csv" in {file.path for file in client.list_artifacts(result["run_id"])}
    runs = client.search_runs([parent.info.experiment_id])
    trials = [run for run in runs if "mantis.trial" in run.data.tags]
    assert len(trials) == TRIALS
    for run in trials:
        assert run.data.tags["mlflow.parentRunId"] == result["run_id"]
        assert run.data.tags["mantis.state"] == "finished"
        assert {"mantis.stage_run.stage1", "mantis.stage_run.stage2"} <= set(run.data.tags)
        assert run.data.metrics["search/wire_bytes"] > 0
    stages = [run for run in runs if run.data.tags.get("mantis.stage") == "stage2"]
    for run in stages:
        history = client.get_metric_history(run.info.run_id, "holdout/top1")
        assert sorted({metric.step for metric in history} - {0}) == [1, 2]


@pytest.mark.timeout(900)
def test_the_front_is_registered_and_found_by_its_bits_from_elsewhere(
    finished: tuple[Path, Path, Any],
) -> None:
    folder, _, result = finished
    assert all(point["model"] for point in result["front"])
    listed = json.loads(elsewhere(folder, "models", "--max-bpp", "100000", "--json"))["models"]
    assert len(listed) == len(result["front"])
    assert listed[0]["top1"] == max(model["top1"] for model in listed)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    version = client.get_model_version("mantis", listed[0]["version"])
    assert version.tags["mantis.trial"] in {str(point["trial"]) for point in result["front"]}


@pytest.mark.timeout(900)
def test_a_finished_search_is_told_again_and_nothing_of_it_is_run_again(
    finished: tuple[Path, Path, Any],
) -> None:
    folder, path, result = finished
    stamps = {p: p.stat().st_mtime for p in (folder / "runs/stages").glob("*/DONE")}
    command = ("tune", "--config", str(path), "--space", "film", "--trials", str(TRIALS))
    again = last_json(mantis(*command, "--resume", "--json", folder=folder))
    assert again["run_id"] == result["run_id"]
    assert [point["trial"] for point in again["front"]] == [p["trial"] for p in result["front"]]
    assert {p: p.stat().st_mtime for p in stamps} == stamps


def elsewhere(folder: Path, *arguments: str) -> str:
    """`mantis` in another folder, knowing only the tracking URI."""
    uri = f"sqlite:///{folder / 'runs/mlflow.db'}"
    place = folder / "elsewhere"
    place.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=place,
        env={"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout
