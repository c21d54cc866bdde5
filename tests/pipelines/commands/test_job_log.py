"""What can be read of a failed job on a cluster that is gone: its log, and its traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.errors import DataError
from pipelines.commands.errors import TRACEBACK_LINES, Stopped, end_of_traceback, terminal
from pipelines.commands.messages import JOB_CONFIG
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from pipelines.storage import Store

CONFIG = """
data: {sources: [{kind: shapes}]}
tasks: [{name: outline, classes_from: shapes}]
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A remote root: a bucket, of which no path on this disk is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Store, "local_path", lambda self, *parts: None)
    monkeypatch.setattr("pipelines.cluster.preflight.check_room", lambda root: None)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return load_settings(path, [f"storage.root=file://{tmp_path}/bucket"])


def fail(settings: Settings, error: Exception) -> str:
    """Returns the message of a command that fails so."""
    with pytest.raises(Stopped) as stopped, terminal(settings, False, "mantis run"):
        raise error
    return str(stopped.value)


def test_the_log_of_a_command_is_below_its_remote_root_and_its_message_says_where(
    settings: Settings, tmp_path: Path
) -> None:
    message = fail(settings, RuntimeError("out of memory"))
    (log,) = (tmp_path / "bucket/logs").iterdir()
    assert f"Details are in file://{tmp_path}/bucket/logs/{log.name}" in message
    assert "RuntimeError: out of memory" in log.read_text()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("job", "error", "shown"),
    [
        (True, RuntimeError("out of memory"), True),
        (True, DataError("no such image"), False),
        (False, RuntimeError("out of memory"), False),
    ],
)
def test_a_job_prints_its_traceback_unless_the_user_can_mend_it(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    job: bool,
    error: Exception,
    shown: bool,
) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    if job:
        monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "night-1"}}))
    fail(settings, error)
    assert ("Traceback" in capfd.readouterr().err) == shown


def test_a_traceback_in_the_text_of_an_error_stays_in_the_log(
    settings: Settings, tmp_path: Path
) -> None:
    text = "a worker failed to start due to error:\nTraceback (most recent call last):\n  File"
    message = fail(settings, RuntimeError(text))
    assert message.startswith("RuntimeError: a worker failed to start due to error:\nDetails")
    (log,) = (tmp_path / "bucket/logs").iterdir()
    assert "  File" in log.read_text()


def test_a_long_traceback_is_cut_above() -> None:
    def deep(level: int) -> None:
        if level == 0:
            raise RuntimeError("bottom")
        (deep if level % 2 else lambda below: deep(below))(level - 1)

    with pytest.raises(RuntimeError) as found:
        deep(60)
    lines = end_of_traceback(found.value).splitlines()
    assert len(lines) == TRACEBACK_LINES + 1
    assert lines[0].endswith(" lines above")
    assert lines[-1] == "RuntimeError: bottom"
