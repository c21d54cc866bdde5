"""Hashes the code that decides a stage's result. Follows its imports without running it.

The hash covers syntax trees, not text: comments, docstrings, `help` texts and layout do not
change it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

COUNTED = ("mantis_core", "data_prep", "pipelines.training", "pipelines.evaluation")
"""Packages whose code decides results. Other imports are not followed."""
NOT_COUNTED = (
    "mantis_core.config",
    "mantis_core.architecture",
    "data_prep.config",
    "pipelines.training.callback",
)
"""Modules among them that decide no result. The values of a config are in the key already."""


@functools.cache
def source_hash(*entries: str, repository: Path = REPOSITORY) -> str:
    """Returns the sha256 over the syntax trees of `entries` and of the counted modules they import.

    `entries` are module names. The path of the repository does not enter the hash. Raises
    FileNotFoundError for an entry that is no module.
    """
    digest = hashlib.sha256()
    for module in sorted(reached_modules(entries, repository)):
        digest.update(f"{module}\0{_parsed(_text(module, repository))[1]}\0".encode())
    return digest.hexdigest()


def module_hashes(*entries: str, repository: Path = REPOSITORY) -> dict[str, str]:
    """Returns 12 hex digits for the syntax tree of each module that `source_hash` covers."""
    return {
        module: hashlib.sha256(_parsed(_text(module, repository))[1].encode()).hexdigest()[:12]
        for module in sorted(reached_modules(entries, repository))
    }


def reached_modules(entries: Iterable[str], repository: Path = REPOSITORY) -> set[str]:
    """Returns the entries and all counted modules that they import, directly or indirectly."""
    reached: set[str] = set()
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            imported, _ = _parsed(_text(module, repository))
            waiting += [name for name in imported if _counts(name, repository)]
    return reached


def _imported(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _counts(module: str, repository: Path) -> bool:
    counted = f"{module}.".startswith(tuple(f"{name}." for name in COUNTED))
    return counted and module not in NOT_COUNTED and _module_file(module, repository).is_file()


def _text(module: str, repository: Path) -> str:
    return _module_file(module, repository).read_text(encoding="utf-8")


@functools.cache
def _parsed(text: str) -> tuple[frozenset[str], str]:
    """Returns what a file imports, and its code as canonical text. Each text is parsed once."""
    tree = ast.parse(text)
    imported = frozenset(name for node in ast.walk(tree) for name in _imported(node))
    return imported, _canonical(_without_texts(tree))


def _module_file(module: str, repository: Path) -> Path:
    path = repository.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _without_texts(tree: ast.Module) -> ast.Module:
    """Returns the tree without texts for people: docstrings and arguments named `help`."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            node.keywords = [each for each in node.keywords if each.arg != "help"]
    return tree


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _canonical(node: object) -> str:
    """Returns a tree as text that is the same in Python 3.11 and later: without empty fields."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={_canonical(value)}" for name, value in _filled(node))
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    return repr(node)


def _filled(node: ast.AST) -> Iterator[tuple[str, object]]:
    for name, value in ast.iter_fields(node):
        if value is not None and value != []:
            yield name, value
