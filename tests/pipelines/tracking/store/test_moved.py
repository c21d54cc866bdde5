"""Addresses of artifacts in a store whose root was moved or copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.tracking.runs import Tracker, locate_tracking
from pipelines.tracking.store.moved import (
    artifact_address,
    local_folder,
    relocate_all,
    relocated,
)


@pytest.mark.parametrize("name", ["plain", "a%20b", "what?", "r#1", "ünï runs"])
def test_the_address_of_a_folder_leads_back_to_it(name: str) -> None:
    folder = Path("/data") / name / "mlartifacts"
    assert local_folder(artifact_address(folder)) == folder


@pytest.mark.parametrize("address", ["s3://bucket/mlartifacts/r", "mlflow-artifacts:/r"])
def test_a_remote_address_stays(address: str, tmp_path: Path) -> None:
    assert local_folder(address) is None
    assert relocated(address, tmp_path) == address


def test_an_address_follows_its_files_and_never_leads_away_from_them(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    address = f"{old}/mlartifacts/run/artifacts"
    assert relocated(address, old) == address
    assert relocated(address, new) == f"{new}/mlartifacts/run/artifacts"  # moved, or without files
    (old / "mlartifacts/run/artifacts").mkdir(parents=True)
    assert relocated(address, new) == address  # of another root that shares the store
    (new / "mlartifacts/run/artifacts").mkdir(parents=True)
    assert relocated(address, new) == f"{new}/mlartifacts/run/artifacts"  # copied
    assert relocated(f"{old}/elsewhere/run", new) == f"{old}/elsewhere/run"
    inside = f"{tmp_path}/mlartifacts/x/mlartifacts/run"
    assert relocated(inside, new) == f"{new}/mlartifacts/run"


def test_a_copied_store_logs_to_its_own_root(mlflow_template: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copy(mlflow_template, old / "mlflow.db")
    run_id = Tracker(locate_tracking(None, str(old)), "mantis").open_pipeline("tiny", {}, "plan")
    assert run_id is not None
    shutil.copytree(old, new)

    copy = Tracker(locate_tracking(None, str(new)), "mantis")
    assert copy.open_pipeline("tiny", {}, "plan") == run_id
    copy.client.log_text(run_id, "hello", "note.txt")
    assert [file.name for file in (new / "mlartifacts").rglob("*.txt")] == ["note.txt"]
    assert not (old / "mlartifacts").exists()
    assert relocate_all(new / "mlflow.db") == 0
