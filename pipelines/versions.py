"""The packages that decide a result, and the commit and versions that a run records."""

from __future__ import annotations

import contextlib
import json
import subprocess
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


def installed() -> dict[str, str]:
    """Returns the installed version of each deciding package."""
    return {package: metadata.version(package) for package in DECIDING_PACKAGES}


def commit() -> str:
    """Returns the commit of the checkout the package runs from; "" outside a checkout."""
    return git("rev-parse", "HEAD")


def provenance() -> dict[str, str]:
    """Returns the tags by which a run records its code and packages."""
    versions = {**installed(), **_present("ray", "mlflow")}
    tags = {"mantis.versions": json.dumps(versions), "mlflow.source.name": "mantis"}
    if head := commit():
        tags["mlflow.source.git.commit"] = head
        tags["mantis.uncommitted_changes"] = str(bool(git("status", "--porcelain"))).lower()
    return tags


def _present(*packages: str) -> dict[str, str]:
    """Returns the versions of the packages among these that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git(*arguments: str) -> str:
    """Returns the output of a git command; "" if the command fails or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
