"""Models of any name, in any experiment, and the files of models behind a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipelines.tracking.registry import RegistryError, models, promote, register
from pipelines.tracking.runs import Tracker, TrackingLocation
from pipelines.tracking.store import versions
from pipelines.tracking.store.versions import CHECKPOINT_FILES, find_version, resolve_model
from tests.pipelines.tracking.test_registry import Chain, checkpoint  # noqa: F401


@pytest.fixture
def pets(location: TrackingLocation, tmp_path: Path, checkpoint: Path) -> Chain:  # noqa: F811
    """A finished run in the experiment `animals` whose config names its model `my pets`."""
    tracker = Tracker(location, "animals", model="my pets")
    return Chain(tracker, tmp_path / "runs", checkpoint)


def test_a_run_is_registered_under_its_own_name_and_in_its_own_experiment(
    pets: Chain, tracker: Tracker
) -> None:
    """By a command, whose tracker knows neither."""
    assert register(tracker, "latest") == {"model": "models:/my pets/1", "version": "1"}
    client: MlflowClient = tracker.client
    assert [each.name for each in client.search_experiments()].count("mantis") == 0
    experiment = client.get_experiment_by_name("animals").experiment_id
    assert {m.name for m in client.search_logged_models([experiment])} >= {"my pets-client"}
    [found] = models(tracker)
    assert (found["model"], found["name"], found["aliases"]) == (
        "models:/my pets/1",
        "my pets",
        ["candidate"],
    )
    for name in ("my pets@candidate", "my pets/1", "my pets-client@candidate"):
        folder = resolve_model(f"models:/{name}", tracker.location.uri)
        assert all((folder / file).is_file() for file in CHECKPOINT_FILES)

    assert promote(tracker, found["model"])["aliases"] == ["candidate", "champion"]
    assert promote(tracker, "1", "best")["model"] == "models:/my pets/1"
    assert client.get_model_version_by_alias("my pets-server", "champion").version == 1


def test_a_number_is_not_enough_where_models_have_several_names(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cars", "pets"]
    found = [(SimpleNamespace(name=name), []) for name in names]
    monkeypatch.setattr("pipelines.tracking.registry.codec_versions", lambda _: found)
    with pytest.raises(RegistryError, match=r"several names \(cars, pets\)"):
        promote(tracker, "1")
    found.append((SimpleNamespace(name="mantis"), []))
    with pytest.raises(RegistryError, match="no model models:/mantis/1"):
        promote(tracker, "1")


def test_a_model_that_others_registered_is_not_listed(tracker: Tracker) -> None:
    tracker.client.create_registered_model("theirs")
    tracker.client.create_model_version("theirs", "/somewhere")
    assert models(tracker) == []
    assert find_version(tracker.client, tracker.location.uri, "models:/theirs/1").version == 1


def test_files_of_a_server_are_downloaded_once(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def download(*, artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        calls.append(artifact_uri)
        return str(shutil.copytree(checkpoint, Path(dst_path) / "checkpoint"))

    version = SimpleNamespace(name="mantis", version=3, creation_timestamp=1000)
    monkeypatch.setattr(versions, "download_artifacts", download)
    monkeypatch.setattr(versions, "find_version", lambda *_: version)
    monkeypatch.setattr(versions, "files_of", lambda *_: "models:/m-1")
    first = resolve_model("models:/mantis/3", "http://host:5000")
    assert resolve_model("models:/mantis/3", "http://host:5000") == first
    assert calls == ["models:/m-1/artifacts/checkpoint"]
    assert first.is_relative_to(tmp_path / "cache/mantis/models")
    assert (tmp_path / "cache/mantis").stat().st_mode & 0o777 == 0o700
    version.creation_timestamp = 2000  # the server was made anew
    assert resolve_model("models:/mantis/3", "http://host:5000") != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted(
        [first.name, resolve_model("models:/mantis/3", "http://host:5000").name]
    )
