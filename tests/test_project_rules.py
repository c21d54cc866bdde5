"""The rules of the tree no tool checks: who imports whom, sizes, names, no pickle, quiet imports.

Holds no test of behaviour.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.root import ROOT

PACKAGES = ("mantis_core", "mantis_lite", "data_prep", "tune_spaces", "pipelines")
FORBIDDEN = {
    "mantis_core": {"ray", "mlflow", "pyarrow", "data_prep", "tune_spaces", "pipelines"},
    # Of mantis_core it may import one module, and readers alone torch: tests/test_import_order.py.
    "mantis_lite": {"torch", "ray", "mlflow", "pyarrow", "data_prep", "tune_spaces", "pipelines"},
    "data_prep": {"mlflow", "tune_spaces", "pipelines"},
    "tune_spaces": {"torch", "mlflow", "mantis_core", "data_prep", "pipelines"},
    "pipelines": set(),
}
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}
MAX_LINES = 400
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def modules(*packages: str) -> list[Path]:
    return sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value).split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_place_allows(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(FORBIDDEN[package] & set(imported(parse(path))))
        for path in modules(package)
    }
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_walk_sees_imports_inside_functions() -> None:
    source = (
        "def f():\n    import ray.data\n    from mlflow import log\n    import_module('torch.nn')"
    )
    assert set(imported(ast.parse(source))) == {"ray", "mlflow", "torch"}


def test_search_spaces_are_declarations_only() -> None:
    """Assignments, imports and definitions at the top level; no loops, no calls for effect."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Expr,
    )
    for path in modules("tune_spaces"):
        for node in parse(path).body:
            assert isinstance(node, allowed), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=names(modules(*PACKAGES)))
class TestEveryModule:
    def test_says_what_it_holds(self, path: Path) -> None:
        assert ast.get_docstring(parse(path))

    def test_has_a_name_that_says_something(self, path: Path) -> None:
        assert path.stem not in VAGUE_NAMES

    def test_unpickles_nothing(self, path: Path) -> None:
        tree = parse(path)
        assert set(imported(tree)) & UNPICKLERS == set()
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle"):
                safe = node.arg == "weights_only"
                assert isinstance(node.value, ast.Constant), f"line {node.value.lineno}"
                assert node.value.value is safe, f"line {node.value.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only" in {k.arg for k in node.keywords}, f"line {node.lineno}"

    def test_swallows_no_error(self, path: Path) -> None:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler):
                wide = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                silent = all(isinstance(each, ast.Pass) for each in node.body)
                assert not (wide and silent), f"line {node.lineno}"


def test_one_file_of_the_tests_knows_where_the_repository_begins() -> None:
    """A test that is moved to another folder would count its parents wrongly."""
    counting = {
        str(path.relative_to(ROOT))
        for path in modules("tests")
        if re.search(r"\(__file__\)\S*\.parents\b", path.read_text(encoding="utf-8"))
    }
    assert counting == {"tests/root.py"}


def test_every_file_is_short_enough_to_read() -> None:
    """Tests, benchmarks and the documents' generator too."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules(*PACKAGES, "benchmarks", "docs", "tests")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


QUIET = """
import logging, os, pathlib, sys, warnings
warnings.simplefilter("ignore")
import {outside}
environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
for name in {modules!r}:
    __import__(name)
changed = {{k for k in environment.keys() | os.environ.keys()
           if environment.get(k) != os.environ.get(k)}}
assert not changed, changed
assert logging.getLogger().handlers == handlers, "logging was set up"
assert not list(pathlib.Path().iterdir()), list(pathlib.Path().iterdir())
"""


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    """No environment variable, log handler or file is made by importing every module.

    What dependencies do to the environment is not ours: they are imported first.
    """
    paths = modules(*PACKAGES)
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if path.stem not in ("__init__", "__main__")
    ]
    outside = sorted({name for path in paths for name in top_level_imports(path)})
    done = subprocess.run(
        [sys.executable, "-c", QUIET.format(outside=", ".join(outside), modules=found)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def top_level_imports(path: Path) -> Iterator[str]:
    """Full names of other projects' modules that a module imports when it is imported."""
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            first = node.module.split(".")[0]
            if first not in (*PACKAGES, "__future__"):
                yield node.module


def test_the_lock_file_pins_versions_and_names_no_host() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    packages = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(packages) > 50
    assert [
        line for line in packages if not re.match(r"^[A-Za-z0-9._-]+(\[[^]]+\])?==\S+", line)
    ] == []
    assert [line for line in lines if "://" in line or line.startswith("-")] == []
