"""Kill -9 of the driver in the middle of stage 2: the same command goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.pipelines.experiment import last_json, mantis, paint, planned_hashes, write_config

EPOCHS = 4


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_killed_driver_loses_no_finished_stage_and_no_epoch(tmp_path: Path) -> None:
    paint(tmp_path / "images", train=130)
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["stage2"]["epochs"] = EPOCHS
    path.write_text(yaml.safe_dump(config))

    command = [sys.executable, "-m", "pipelines", "run", "--config", str(path)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("stage2: epoch 2/"):
                driver.send_signal(signal.SIGKILL)
                break
    assert driver.returncode == -signal.SIGKILL

    result = last_json(mantis("run", "--config", str(path), "--json", folder=tmp_path))
    status = {name: stage["status"] for name, stage in result["stages"].items()}
    assert status == {
        "prepare": "skipped",
        "stage1": "skipped",
        "stage2": "resumed",
        "evaluate": "ran",
        "register": "ran",
    }
    consumed = result["stages"]["stage2"]["rows"]["sha256"]
    assert consumed == planned_hashes(path, "stage2")
    assert len(set(consumed)) == EPOCHS
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    experiment = client.get_run(result["run_id"]).info.experiment_id
    runs = client.search_runs([experiment])
    runs = [run for run in runs if "mantis.arm" not in run.data.tags]
    stages = sorted(run.data.tags.get("mantis.stage", "") for run in runs)
    assert stages == ["", "evaluate", "prepare", "register", "stage1", "stage2"]
    stage2 = next(run for run in runs if run.data.tags.get("mantis.stage") == "stage2")
    steps = [m.step for m in client.get_metric_history(stage2.info.run_id, "train/loss")]
    assert steps == list(range(1, EPOCHS + 1))
    assert stage2.info.status == "FINISHED"
    folder = next((tmp_path / "runs/stages").glob("stage2-*"))
    assert (
        json.loads((folder / "checkpoint/meta.json").read_text())["key"]
        == (result["stages"]["stage2"]["key"])
    )
