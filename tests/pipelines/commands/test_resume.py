"""The line that resumes a command can be pasted where the command was typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.commands.messages import JOB_CONFIG, _program, command_line, resuming


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a virtual environment that is not on PATH."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("mantis", "python"):
        (binaries / name).write_text("#!/bin/sh\n")
        (binaries / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return binaries


def test_a_program_that_is_not_on_the_path_is_named_by_its_place(environment: Path) -> None:
    mantis, python = str(environment / "mantis"), str(environment / "python")
    module = "/somewhere/pipelines/__main__.py"
    assert _program(mantis, python) == [".venv/bin/mantis"]
    assert _program(module, python) == [".venv/bin/python", "-m", "pipelines"]
    assert _program("/elsewhere/bin/mantis", python) == ["/elsewhere/bin/mantis"]


def test_a_program_on_the_path_is_named_by_its_name(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert _program(str(environment / "mantis"), sys.executable) == ["mantis"]
    module = "/somewhere/pipelines/__main__.py"
    assert _program(module, str(environment / "python")) == ["python", "-m", "pipelines"]


def test_words_are_quoted_for_the_shell() -> None:
    assert command_line(["run", "--config", "my file.yaml"]).endswith("run --config 'my file.yaml'")


def test_a_submitted_job_is_resumed_by_submitting_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert resuming("mantis run") == "Resume with:\n  mantis run"
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "night-1"}}))
    assert resuming("mantis run") == (
        "To resume, submit the job night-1 again with another --submission-id. It ran:\n"
        "  mantis run"
    )
