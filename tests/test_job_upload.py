"""The upload of `ray job submit --working-dir .`, by Ray's own packing: small and sufficient."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.ray_private import create_package

ROOT = Path(__file__).parent.parent
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The upload of this tree, with results of runs in it that are to stay behind."""
    folder = tmp_path_factory.mktemp("upload")
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in ("runs/stages/large.bin", ".venv/lib/large.bin", "mlflow.db", ".git/large.bin"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(bytes(1000))
    path = folder / "package.zip"
    create_package(str(tree), path, include_gitignore=True)
    return path


def test_it_is_small(package: Path) -> None:
    assert package.stat().st_size < MAX_BYTES


def test_it_holds_code_configs_and_lock_file_and_nothing_else_large(package: Path) -> None:
    names = set(zipfile.ZipFile(package).namelist())
    assert {"requirements.lock", "configs/quickstart.yaml", "pipelines/__main__.py"} <= names
    assert {
        "mantis_core/training/teacher.py",
        "data_prep/sources/kinds.py",
        "tune_spaces/joint.py",
    } <= names
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"runs", ".venv", ".git", "mlflow.db", "tests", "results", "docs"}
