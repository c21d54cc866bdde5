"""The hash over a stage's code: what it reaches, what it leaves out, and what changes it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.chain.source_hash import REPOSITORY, reached_modules, source_hash
from pipelines.stages.order import STAGES

TRAININGS = [stage.name for stage in STAGES.values() if stage.trains]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    source_hash.cache_clear()
    yield
    source_hash.cache_clear()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    core, training = tmp_path / "mantis_core", tmp_path / "pipelines" / "training"
    core.mkdir()
    training.mkdir(parents=True)
    (training / "worker.py").write_text(
        "import torch\nfrom pipelines.tracking import x\ndef f():\n    from mantis_core import a\n"
    )
    (tmp_path / "pipelines" / "tracking.py").write_text("import mantis_core.unused\n")
    (core / "__init__.py").write_text("")
    (core / "a.py").write_text("from mantis_core.b import thing\n")
    (core / "b.py").write_text("thing = 1\n")
    (core / "unused.py").write_text("")
    return tmp_path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages whose files a test may change."""
    for package in ("mantis_core", "data_prep", "pipelines"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    return tmp_path


def now(repository: Path, *entries: str) -> str:
    source_hash.cache_clear()
    return source_hash(*entries, repository=repository)


def hashes(repository: Path) -> dict[str, str]:
    """The hash of every stage's code."""
    return {name: now(repository, *stage.code) for name, stage in STAGES.items()}


def append(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text()}\n{text}\n")


def test_the_code_of_a_stage_is_what_it_imports_of_counted_rooms(repository: Path) -> None:
    assert reached_modules(["pipelines.training.worker"], repository) == {
        "pipelines.training.worker",
        "mantis_core",
        "mantis_core.a",
        "mantis_core.b",
    }


def test_only_reached_code_changes_the_hash(repository: Path) -> None:
    entry = "pipelines.training.worker"
    before = now(repository, entry)
    (repository / "mantis_core" / "unused.py").write_text("x = 1\n")
    assert now(repository, entry) == before
    (repository / "mantis_core" / "b.py").write_text("thing = 2\n")
    assert now(repository, entry) != before


def test_comments_docstrings_and_layout_change_nothing(repository: Path) -> None:
    entry = "pipelines.training.worker"
    file = repository / "mantis_core" / "b.py"
    file.write_text("def f(x):\n    return x + 1\n\nclass C:\n    y = 2\n")
    before = now(repository, entry)
    file.write_bytes(
        b'"""Says what it holds."""\r\n\r\n# why\r\ndef f(x):\r\n    """Adds."""\r\n'
        b'    return (x\r\n            + 1)\r\n\r\nclass C:\r\n    """Has."""\r\n    y = 2\r\n'
        b'    """Two."""\r\n'
    )
    assert now(repository, entry) == before
    file.write_text("def f(x):\n    return x + 2\n\nclass C:\n    y = 2\n")
    assert now(repository, entry) != before


def test_a_comment_or_docstring_in_any_file_changes_no_stage(copy: Path) -> None:
    before = hashes(copy)
    for path in copy.rglob("*.py"):
        text = path.read_text()
        head = ast.get_docstring(ast.parse(text), clean=False)
        if head is not None:
            text = text.replace(head, f"{head}\nOne more sentence.\n", 1)
        path.write_text(f"{text}\n# a comment\n")
    assert hashes(copy) == before


def test_the_help_of_a_stage_changes_no_key(copy: Path) -> None:
    before = hashes(copy)
    for stage in STAGES.values():
        if stage.help:
            path = copy / "pipelines" / "stages" / f"{stage.name}.py"
            assert stage.help in path.read_text()
            path.write_text(path.read_text().replace(stage.help, "Do it."))
    assert hashes(copy) == before


def test_a_constant_of_the_bitstream_retrains_no_teacher_and_no_stage1(copy: Path) -> None:
    before = hashes(copy)
    for path in (copy / "mantis_core" / "bitstream").glob("*.py"):
        append(path, "ANOTHER = 7")
    after = hashes(copy)
    assert {name for name in TRAININGS if after[name] == before[name]} >= {"teacher", "stage1"}
    assert after["stage2"] != before["stage2"]
    assert after["evaluate"] != before["evaluate"]


def test_a_constant_of_the_loop_changes_every_training(copy: Path) -> None:
    before = hashes(copy)
    append(copy / "mantis_core" / "training" / "loop.py", "ANOTHER = 7")
    after = hashes(copy)
    assert {name for name in STAGES if after[name] != before[name]} >= set(TRAININGS)
    assert after["prepare"] == before["prepare"]


@pytest.mark.parametrize(
    "path",
    [
        "data_prep/sources/shapes.py",
        "data_prep/config.py",
        "mantis_core/codec/client_codec.py",
        "mantis_core/networks/client.py",
        "mantis_core/networks/server.py",
        "pipelines/terminal/progress.py",
        "pipelines/cluster/connect.py",
        "pipelines/tracking/runs.py",
    ],
)
def test_what_makes_no_teacher_leaves_the_teacher_alone(path: str, copy: Path) -> None:
    before = hashes(copy)
    append(copy / path, "ANOTHER = 7")
    assert hashes(copy)["teacher"] == before["teacher"]


def test_what_a_stage_starts_from_exists_and_training_reaches_the_science() -> None:
    for stage in STAGES.values():
        assert set(stage.code) <= reached_modules(stage.code)
    reached = reached_modules(STAGES["stage2"].code)
    assert {
        "mantis_core.codec.mantis",
        "mantis_core.training.losses",
        "data_prep.read.batches",
    } <= reached
