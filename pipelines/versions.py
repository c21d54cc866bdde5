"""The packages that decide a result, and the commit and versions that a run records."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

DECIDING_PACKAGES = (
    "torch",
    "torchvision",
    "compressai",
    "torchdistill",
    "constriction",
    "numpy",
    "pillow",
    "pyarrow",
)
"""Their versions enter every stage's key, and MLflow records them."""
PROJECT = Path(__file__).resolve().parents[1]
"""The folder that holds our packages: a checkout, an upload or an environment's site-packages."""
PACKAGES = ("data_prep", "mantis_core", "mantis_lite", "pipelines", "tune_spaces")
DISTRIBUTION = "mantis-codec"
COMMIT_VARIABLE = "MANTIS_COMMIT"


def installed() -> dict[str, str]:
    """Returns the installed version of each deciding package, with its local part.

    That part names a build, such as `+cpu` or `+cu132`. MLflow records it.
    """
    return {package: metadata.version(package) for package in DECIDING_PACKAGES}


def deciding() -> dict[str, str]:
    """Returns the same versions without their local parts, as they enter every stage's key.

    A colleague with a CPU build of torch shares results with one who has a CUDA build. What a
    training ran on is recorded with its result.
    """
    return {package: version.partition("+")[0] for package, version in installed().items()}


def release() -> str:
    """Returns the version of MANTiS; "unknown" if it runs without being installed."""
    return _present(DISTRIBUTION).get(DISTRIBUTION, "unknown")


def commit() -> str:
    """Returns the commit of this code; "" if nothing names it.

    The variable MANTIS_COMMIT goes first: a Ray job runs from an upload without .git. Then comes
    pipelines/commit.txt, where `git archive` writes the commit, and then the checkout itself.
    """
    if stated := os.environ.get(COMMIT_VARIABLE, "").strip():
        return stated
    file = PROJECT / "pipelines" / "commit.txt"
    written = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if re.fullmatch("[0-9a-f]{40,64}", written):
        return written
    return _git("rev-parse", "HEAD") if _is_own_checkout() else ""


@functools.cache
def source_sha256(project: Path | None = None) -> str:
    """Returns the sha256 of all source files, by which code can be told apart without git.

    An installed package has the same as the checkout it was built from.
    """
    root, digest = project or PROJECT, hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def provenance() -> dict[str, str]:
    """Returns the tags by which a run records its code and packages."""
    versions = {**installed(), **_present("ray", "mlflow")}
    tags = {
        "mantis.versions": json.dumps(versions),
        "mantis.source_sha256": source_sha256(),
        "mlflow.source.name": "mantis",
    }
    if head := commit():
        tags["mlflow.source.git.commit"] = head
        if _is_own_checkout():
            changed = _git("status", "--porcelain")
            tags["mantis.uncommitted_changes"] = str(bool(changed)).lower()
    return tags


def _present(*packages: str) -> dict[str, str]:
    """Returns the versions of the packages among these that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _is_own_checkout() -> bool:
    """Returns whether this code lies in a git repository of its own.

    Installed in an environment inside another repository, it must not take that one's commit.
    """
    root, file = _git("rev-parse", "--show-toplevel"), PROJECT / "pyproject.toml"
    if not root or Path(root).resolve() != PROJECT.resolve() or not file.is_file():
        return False
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return bool(project.get("name") == DISTRIBUTION)


def _git(*arguments: str) -> str:
    """Returns the output of a git command; "" if the command fails or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
