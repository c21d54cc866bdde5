"""One hash over the source files a stage runs, found by following imports; runs none of them."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("mantis_core", "data_prep", "pipelines")

# Plumbing: it moves files, messages and resources, and decides no number of an artifact.
PLUMBING = frozenset(
    f"pipelines.{name}"
    for name in (
        "__main__",
        "cli_chain",
        "cli_errors",
        "cli_models",
        "cli_score",
        "cli_tune",
        "cluster",
        "console",
        "logs",
        "metric_writer",
        "plan",
        "progress",
        "registry",
        "report",
        "report_figures",
        "run_record",
        "settings",
        "settings_errors",
        "source_hash",
        "stage_callback",
        "stages",
        "storage",
        "tracking",
    )
)


@functools.cache
def source_hash(*entries: str, repository: Path = REPOSITORY) -> str:
    """sha256 over the files of `entries` (module names) and all they import, plumbing left out.

    Line endings do not matter, nor where the repository lies. Raises FileNotFoundError for an
    entry that is no module.
    """
    digest = hashlib.sha256()
    for module in sorted(reached_modules(entries, repository)):
        text = _module_file(module, repository).read_text(encoding="utf-8")
        digest.update(f"{module}\0{text}\0".encode())
    return digest.hexdigest()


def reached_modules(entries: Iterable[str], repository: Path = REPOSITORY) -> set[str]:
    """The modules of this repository that `entries` import, directly or not, and themselves."""
    reached: set[str] = set()
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            tree = ast.parse(_module_file(module, repository).read_text(encoding="utf-8"))
            found = {name for node in ast.walk(tree) for name in _imported(node)}
            waiting += [name for name in found - PLUMBING if _is_ours(name, repository)]
    return reached


def _imported(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_ours(module: str, repository: Path) -> bool:
    ours = module.split(".")[0] in PACKAGES
    return ours and _module_file(module, repository).is_file()


def _module_file(module: str, repository: Path) -> Path:
    path = repository.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
