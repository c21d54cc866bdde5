"""One rule for the store: the config, then MLflow's variables, then the storage root."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings, to_yaml
from pipelines.settings.sections import Settings, TrackingConfig
from pipelines.settings.tracking import describe_store, experiment_name, store_uri

ELSEWHERE = "sqlite:////data/other.db"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ELSEWHERE)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pets")
    return monkeypatch


def load(folder: Path, text: str = "", *overrides: str) -> Settings:
    path = folder / "tiny.yaml"
    path.write_text(
        "data: {sources: [{kind: shapes}]}\ntasks: [{name: outline, classes_from: shapes}]\n" + text
    )
    return load_settings(path, overrides)


@pytest.mark.parametrize("overrides", [(), ("seed=1",)])
def test_the_variables_fill_what_the_config_leaves_out(
    tmp_path: Path, variables: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    tracking = load(tmp_path, "", *overrides).tracking
    assert (tracking.uri, tracking.experiment) == (ELSEWHERE, "pets")


def test_the_config_and_an_override_beat_the_variables(
    tmp_path: Path, variables: pytest.MonkeyPatch
) -> None:
    text = "tracking: {uri: 'http://own:5000', experiment: mine}\n"
    tracking = load(tmp_path, text).tracking
    assert (tracking.uri, tracking.experiment) == ("http://own:5000", "mine")
    tracking = load(tmp_path, text, "tracking.experiment=third").tracking
    assert (tracking.uri, tracking.experiment) == ("http://own:5000", "third")


def test_without_variables_the_root_has_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # set, and empty
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    settings = load(tmp_path, "", f"storage.root={tmp_path}/runs")
    assert (settings.tracking.uri, settings.tracking.experiment) == (None, "mantis")
    shown = describe_store(settings.tracking, settings.storage.root)
    assert shown == f"{tmp_path}/runs/mlflow.db, experiment mantis, model mantis"


def test_tracking_that_is_off_asks_no_variable(
    tmp_path: Path, variables: pytest.MonkeyPatch
) -> None:
    variables.setenv("MLFLOW_TRACKING_URI", "databricks")
    settings = load(tmp_path, "", "tracking.enabled=false")
    assert settings.tracking.uri is None
    assert "off" in describe_store(settings.tracking, "/runs")


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:./mlruns", "file:/x", "databricks", "databricks://p", "sqlite://"]
)
def test_a_uri_that_is_no_store_is_refused_with_its_name_and_the_way_out(uri: str) -> None:
    with pytest.raises(SettingsError, match=r"^tracking\.uri is .*Leave it out"):
        store_uri(uri)
    with pytest.raises(SettingsError, match=r"^MLFLOW_TRACKING_URI is .*Unset MLFLOW_TRACKING_URI"):
        store_uri(None, {"MLFLOW_TRACKING_URI": uri})


@pytest.mark.parametrize("uri", ["mysql+pymysql://u:p@h/db", "https://h", "postgresql://h/db"])
def test_servers_of_all_kinds_are_taken_as_they_are(uri: str) -> None:
    assert store_uri(uri) == uri


def test_a_relative_file_is_that_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri("sqlite:///my.db") == f"sqlite:///{tmp_path}/my.db"
    assert store_uri(ELSEWHERE) == ELSEWHERE


def test_a_command_with_a_root_does_not_ask_the_variable() -> None:
    assert store_uri(None, {"MLFLOW_TRACKING_URI": ELSEWHERE}, ask=False) is None
    assert experiment_name(None, {"MLFLOW_EXPERIMENT_NAME": " pets "}) == "pets"
    assert experiment_name("own", {"MLFLOW_EXPERIMENT_NAME": "pets"}) == "own"


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, "", "tracking.uri=http://me:secret@host:5000")
    assert "secret" not in to_yaml(settings)
    assert describe_store(settings.tracking, "/runs").startswith("http://me:***@host:5000,")
    with pytest.raises(SettingsError) as caught:
        store_uri("ftp://me:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "", " a", 'a"b'])
def test_a_models_name_can_be_written_in_a_models_uri(name: str) -> None:
    with pytest.raises(ValueError, match="model"):
        TrackingConfig(model=name)
    assert TrackingConfig(model="my pets-2.x").model == "my pets-2.x"
