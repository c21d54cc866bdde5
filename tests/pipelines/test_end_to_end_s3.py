"""The main job with images and results in a bucket, and MLflow on this machine's disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.storage import Store
from tests.pipelines.experiment import last_json, mantis, paint, write_config
from tests.s3 import s3_environment, s3_server

STAGES = ("prepare", "teacher", "stage1", "stage2", "evaluate", "register")
ROOT = "s3://bucket/runs"
PASSING = ("runs/training/", "runs/scratch/")
"""Folders of checkpoints and of temporary files."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_chain_runs_in_a_bucket_and_leaves_nothing_behind(tmp_path: Path) -> None:
    paint(tmp_path / "images")
    command = ["run", "--config", str(write_config(tmp_path)), "--json"]
    command += [f"storage.root={ROOT}", "data.root=s3://bucket/images", "teacher.weights=train"]
    command += ["teacher.training.epochs=1", "teacher.training.batch_size=16"]
    command += ["cluster.workers=1", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    with s3_server() as server, s3_environment(server):
        Store("s3://bucket").upload_folder(tmp_path / "images", "images")
        first = last_json(mantis(*command, folder=tmp_path))
        assert {name: stage["status"] for name, stage in first["stages"].items()} == dict.fromkeys(
            STAGES, "ran"
        )
        keys = server.objects()
        left = ("/staging/", ".partial", ".tmp")
        assert [k for k in keys if k.startswith(PASSING) or any(p in k for p in left)] == []
        again = last_json(mantis(*command, folder=tmp_path))
        assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
        assert again["metrics"] == first["metrics"]
        new = sorted(set(server.objects()) - set(keys))
        assert set(keys) <= set(server.objects())
        assert [key.startswith("runs/logs/") for key in new] == [True]  # its own log
        listed = last_json(mantis("ls", "--root", ROOT, "--json", folder=tmp_path))
        assert {stage["name"] for stage in listed["stages"]} == set(STAGES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
            report = last_json(
                mantis("report", "latest", "-o", "report", "--json", folder=tmp_path)
            )
        assert report["run_id"] == first["run_id"]
        assert (tmp_path / "report").is_dir()
    assert not (tmp_path / "runs/stages").exists()
