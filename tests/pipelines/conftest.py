"""Fixtures of the pipelines tests: an MLflow store initialised once a session and copied."""

import shutil
from pathlib import Path

import pytest

from pipelines.tracking.runs import Tracker, TrackingLocation, locate_tracking


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated sqlite file without runs; making one costs seconds."""
    root = tmp_path_factory.mktemp("mlflow-template")
    assert Tracker(locate_tracking(None, str(root)), "template").experiment_id
    return root / "mlflow.db"


@pytest.fixture
def location(mlflow_template: Path, tmp_path: Path) -> TrackingLocation:
    """A store of this test's own."""
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copy(mlflow_template, root / "mlflow.db")
    return locate_tracking(None, str(root))


@pytest.fixture
def tracker(location: TrackingLocation) -> Tracker:
    return Tracker(location, "mantis")
