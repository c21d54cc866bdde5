"""The code that a run records: its commit, where that is known, and a hash of its files."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines import versions
from pipelines.versions import PROJECT, commit, provenance, source_sha256

OWN = '[project]\nname = "mantis-codec"\n'
HASH = "0123456789abcdef" * 2 + "01234567"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def repository(folder: Path, pyproject: str) -> str:
    """A repository with one commit, whose hash is returned."""
    (folder / "pipelines").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(pyproject)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTIS_COMMIT", raising=False)


def test_a_checkout_of_this_project_records_its_commit_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = repository(tmp_path, OWN)
    monkeypatch.setattr(versions, "PROJECT", tmp_path)
    assert commit() == head
    tags = provenance()
    assert tags["mlflow.source.git.commit"] == head
    assert tags["mantis.uncommitted_changes"] == "false"
    (tmp_path / "new.py").touch()
    assert provenance()["mantis.uncommitted_changes"] == "true"


@pytest.mark.parametrize("pyproject", ['[project]\nname = "their-thesis"\n', "", OWN])
def test_installed_inside_another_repository_it_does_not_take_that_ones_commit(
    pyproject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path, pyproject)
    packages = tmp_path / ".venv/lib/site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(versions, "PROJECT", packages)
    assert commit() == ""


def test_copied_into_another_project_it_does_not_take_that_ones_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path, '[project]\nname = "their-thesis"\n')
    monkeypatch.setattr(versions, "PROJECT", tmp_path)
    assert commit() == ""
    assert "mlflow.source.git.commit" not in provenance()


def test_an_upload_without_git_has_the_commit_that_its_environment_or_archive_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "PROJECT", tmp_path)
    (tmp_path / "pipelines").mkdir()
    assert commit() == ""
    assert len(provenance()["mantis.source_sha256"]) == 64
    (tmp_path / "pipelines/commit.txt").write_text(f"{HASH}\n")
    assert commit() == HASH
    monkeypatch.setenv("MANTIS_COMMIT", "abc123")
    assert commit() == provenance()["mlflow.source.git.commit"] == "abc123"
    assert "mantis.uncommitted_changes" not in provenance()


def test_an_archive_holds_its_commit_and_a_checkout_a_placeholder(tmp_path: Path) -> None:
    placeholder = (PROJECT / "pipelines/commit.txt").read_text()
    rule = (PROJECT / ".gitattributes").read_text()
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/commit.txt").write_text(placeholder)
    (tmp_path / ".gitattributes").write_text(rule)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "archive", "--output", "it.zip", "--format", "zip", "HEAD")
    shutil.unpack_archive(tmp_path / "it.zip", tmp_path / "unpacked")
    written = (tmp_path / "unpacked/pipelines/commit.txt").read_text().strip()
    assert written == git(tmp_path, "rev-parse", "HEAD") != placeholder.strip()


def test_the_hash_of_the_source_changes_with_any_file_and_not_with_its_place(
    tmp_path: Path,
) -> None:
    for number, text in enumerate(("x = 1", "x = 1", "x = 2")):
        (tmp_path / f"{number}/pipelines/stages").mkdir(parents=True)
        (tmp_path / f"{number}/pipelines/stages/new.py").write_text(text)
    first, same, other = (source_sha256(tmp_path / str(number)) for number in range(3))
    assert first == same != other


def test_the_build_of_a_package_is_recorded_and_does_not_change_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builds = {"torch": "2.15.0", "numpy": "1.26.4"}
    monkeypatch.setattr(versions, "DECIDING_PACKAGES", tuple(builds))
    monkeypatch.setattr(versions.metadata, "version", lambda name: builds.get(name, "1"))
    plain = versions.deciding()
    assert plain == builds  # what the registry gives: keys made before stay valid
    for build in ("2.15.0+cpu", "2.15.0+cu132"):
        builds["torch"] = build
        assert versions.deciding() == plain
        assert json.loads(provenance()["mantis.versions"])["torch"] == build
