"""Who may import whom: the order of the rooms, held over every import, inside functions too.

A room is a folder, or a file that stands beside the folders. In each list below a room may import
those further down, and nothing above it. `TYPE_CHECKING` blocks and imports inside functions count.
"""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from tests.root import ROOT

ROOMS = {
    "pipelines": (
        "__main__",
        "commands",
        "serving",
        "shelf",
        "starting",
        "search",
        "extending",
        "chain",
        "stages",
        "evaluation",
        "training",
        "tracking",
        "coding",
        "terminal",
        "export",
        "report",
        "cluster",
        "settings",
        "lease",
        "storage",
        "versions",
    ),
    "mantis_core": (
        "baselines",
        "training",
        "patch",
        "codec",
        "teachers",
        "networks",
        "measure",
        "device",
        "bitstream",
        "symbols",
        "folders",
        "tasks",
        "pixels",
        "architecture",
        "config",
        "rates",
        "errors",
    ),
    "mantis_lite": ("__main__", "client"),
    "data_prep": (
        "prepare",
        "read",
        "finding",
        "tasks",
        "config",
        "reading",
        "sources",
        "manifest",
        "checks",
        "storage",
        "ray_data",
        "imagenet",
        "errors",
    ),
    "tune_spaces": ("joint", "film", "rate", "domains"),
}
PACKAGES = {  # what a package may import of the others
    "pipelines": {"mantis_core", "mantis_lite", "data_prep", "tune_spaces"},
    "mantis_core": set(),
    "mantis_lite": {"mantis_core"},
    "data_prep": set(),
    "tune_spaces": set(),
}
SHARED = {  # modules that another package may import all the same, and why
    # A client reads an image file exactly as prepare does; it needs no torch (docs/decisions.md).
    "data_prep": {"mantis_core.pixels"},
}
ALONE = {  # packages of others, and the only rooms that may import them
    "mlflow": {"pipelines.tracking"},
    "optuna": {"pipelines.search"},
    "torchdistill": {"mantis_core.training"},
    "onnxruntime": {"mantis_lite", "pipelines.export"},
}
NEVER = {  # rooms, and what they reach neither directly nor through others of ours
    "mantis_core.bitstream": ("torch", "torchvision", "compressai"),
    **dict.fromkeys(("mantis_core.device", "mantis_lite"), ("torch", "pydantic", "data_prep")),
    "mantis_core.pixels": ("torch", "mantis_core", "data_prep"),
    # Readers scale crops with torch; whatever prepares or names data needs none.
    **{
        f"data_prep.{room}": ("torch", "torchvision")
        for room in ROOMS["data_prep"]
        if room != "read"
    },
    "data_prep.read": ("data_prep.sources",),
}
MAX_FILES = 13


@dataclass(frozen=True)
class Import:
    """One import: who, whom, in which line."""

    importer: str
    imported: str
    line: int


def modules(root: Path) -> dict[str, Path]:
    """Every module of ours by its full name; a package is its `__init__`."""
    found = {}
    for package in ROOMS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import in the tree: at the top, below TYPE_CHECKING and inside functions."""
    ours = modules(root)
    names, found = set(ours), []
    for name, path in ours.items():
        for node in statements(path.read_text(encoding="utf-8")):
            found += [Import(name, each, node.lineno) for each in named(node, names)]
    return found


@functools.cache
def statements(text: str) -> tuple[Any, ...]:
    """What may import something in a file; each text is parsed once."""
    kinds = (ast.Import, ast.ImportFrom, ast.Call)
    return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))


def named(node: ast.AST, ours: set[str]) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import"
        for alias in node.names:
            below = f"{node.module}.{alias.name}"
            yield below if below in ours else node.module or ""
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        argument = node.args[0]
        if isinstance(argument, ast.Constant):
            yield str(argument.value)


def room(module: str) -> str:
    """`pipelines.stages` of `pipelines.stages.order`."""
    return ".".join(module.split(".")[:2])


def place(module: str) -> int:
    """How far down in its package's list a module's room stands."""
    package, name = room(module).split(".")
    return ROOMS[package].index(name)


def wrong_imports(root: Path) -> list[str]:
    """Imports that go up, leave their package where they may not, or break a promise."""
    ours, found = modules(root), imports(root)
    wrong = []
    for each in found:
        package, other = each.importer.split(".")[0], each.imported.split(".")[0]
        if each.imported in ours and package == other and "." in each.importer:
            allowed = "." not in each.imported or place(each.imported) >= place(each.importer)
        elif other in ROOMS:
            allowed = package == other or other in PACKAGES[package]
            allowed = allowed or each.imported in SHARED.get(package, ())
        else:
            rooms = ALONE.get(other)
            allowed = rooms is None or bool({package, room(each.importer)} & rooms)
        if not allowed:
            wrong.append(f"{each.importer}:{each.line} imports {each.imported}")
    graph = graph_of(found, set(ours))
    for start, never in NEVER.items():
        for module in sorted(name for name in ours if f"{name}.".startswith(f"{start}.")):
            for target in sorted(reached(module, graph)):
                if f"{target}.".startswith(tuple(f"{name}." for name in never)):
                    wrong.append(f"{module} reaches {target}")
    return wrong


def graph_of(found: list[Import], ours: set[str]) -> dict[str, set[str]]:
    """Who imports whom; others' packages by their first name."""
    graph: dict[str, set[str]] = {name: set() for name in ours}
    for each in found:
        name = each.imported if each.imported in ours else each.imported.split(".")[0]
        graph[each.importer].add(name)
    return graph


def reached(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    """All that a module imports, directly or not."""
    seen: set[str] = set()
    waiting = list(graph[module])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
    return seen


def circle(root: Path) -> list[str]:
    """Modules that import each other in a ring, empty if there is none."""
    graph = graph_of(imports(root), set(modules(root)))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_place() -> None:
    found = {room(name) for name in modules(ROOT) if "." in name}
    listed = {f"{package}.{name}" for package, rooms in ROOMS.items() for name in rooms}
    assert found == listed


def test_an_import_only_goes_down() -> None:
    assert wrong_imports(ROOT) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert circle(ROOT) == []


def test_a_folder_holds_at_most_so_many_files() -> None:
    folders = {path.parent for path in modules(ROOT).values()}
    files = {
        str(folder.relative_to(ROOT)): len([f for f in folder.glob("*.py") if f.stem != "__init__"])
        for folder in folders
    }
    assert {name: count for name, count in files.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("pipelines/storage.py", "from pipelines.settings.sections import Settings", "storage"),
        ("mantis_core/bitstream/wire.py", "def f():\n    import torch", "reaches torch"),
        ("mantis_core/tasks.py", "from mantis_core.networks import client", "tasks"),
        ("pipelines/chain/keys.py", "import mlflow", "imports mlflow"),
        ("data_prep/read/decoding.py", "from data_prep.sources import kinds", "reaches data_prep"),
        (
            "data_prep/reading.py",
            "import typing\nif typing.TYPE_CHECKING:\n    import data_prep.sources.base",
            "reaches data_prep",
        ),
        ("data_prep/checks.py", "import mantis_core.errors", "imports mantis_core"),
        ("mantis_core/pixels.py", "def f():\n    import torch", "data_prep.checks reaches torch"),
        ("mantis_core/pixels.py", "import mantis_core.errors", "pixels reaches mantis_core"),
    ],
)
def test_one_wrong_import_is_found(file: str, line: str, complaint: str, tmp_path: Path) -> None:
    for package in ROOMS:
        shutil.copytree(ROOT / package, tmp_path / package)
    assert wrong_imports(tmp_path) == []
    path = tmp_path / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert any(complaint in found for found in wrong_imports(tmp_path))


def test_a_ring_is_found(tmp_path: Path) -> None:
    for package in ROOMS:
        shutil.copytree(ROOT / package, tmp_path / package)
    path = tmp_path / "pipelines/stages/spec.py"
    path.write_text(f"{path.read_text()}\nfrom pipelines.stages import order\n")
    assert "pipelines.stages.spec" in circle(tmp_path)
