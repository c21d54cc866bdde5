"""The hash over a stage's source files: what it reaches and what it leaves out."""

from pathlib import Path

import pytest

from pipelines import plan
from pipelines.source_hash import reached_modules, source_hash


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    core, pipelines = tmp_path / "mantis_core", tmp_path / "pipelines"
    core.mkdir()
    pipelines.mkdir()
    (pipelines / "worker.py").write_text(
        "import torch\nfrom pipelines.tracking import x\ndef f():\n    from mantis_core import a\n"
    )
    (pipelines / "tracking.py").write_text("import mantis_core.unused\n")
    (core / "__init__.py").write_text("")
    (core / "a.py").write_text("from mantis_core.b import thing\n")
    (core / "b.py").write_text("thing = 1\n")
    (core / "unused.py").write_text("")
    return tmp_path


def test_the_code_of_a_stage_is_what_it_imports_but_no_plumbing(repository: Path) -> None:
    assert reached_modules(["pipelines.worker"], repository) == {
        "pipelines.worker",
        "mantis_core",
        "mantis_core.a",
        "mantis_core.b",
    }


def test_only_reached_code_changes_the_hash_and_line_endings_do_not(repository: Path) -> None:
    def now() -> str:
        source_hash.cache_clear()
        return source_hash("pipelines.worker", repository=repository)

    before = now()
    (repository / "mantis_core" / "unused.py").write_text("x = 1\n")
    (repository / "mantis_core" / "b.py").write_bytes(b"thing = 1\r\n")
    assert now() == before
    (repository / "mantis_core" / "b.py").write_text("thing = 2\n")
    assert now() != before
    source_hash.cache_clear()


def test_what_a_stage_starts_from_exists_and_training_reaches_the_science() -> None:
    for entries in plan.ENTRIES.values():
        assert set(entries) <= reached_modules(entries)
    reached = reached_modules(plan.ENTRIES["stage2"])
    assert {"mantis_core.model", "mantis_core.losses", "data_prep.reader"} <= reached
