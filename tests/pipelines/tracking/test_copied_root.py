"""A runs folder that was moved or copied: report, register and encode work on the copy alone."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from pipelines.tracking import lookup
from pipelines.tracking.registry import RegistryError, lineage, models, promote, register
from pipelines.tracking.runs import Tracker, locate_tracking
from pipelines.tracking.store.versions import CHECKPOINT_FILES, part_names, resolve_model
from tests.pipelines.tracking.test_registry import Chain, chain, checkpoint  # noqa: F401

KEYED = ("prepare", "stage2", "evaluate", "register")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def original(chain: Chain, tmp_path: Path) -> Path:  # noqa: F811
    """A root with a registered model."""
    chain.register()
    return tmp_path / "runs"


def opened(root: Path) -> Tracker:
    return Tracker(locate_tracking(None, str(root)), "mantis")


def uri(root: Path) -> str:
    return locate_tracking(None, str(root)).uri


def test_a_copy_is_read_and_registered_and_the_original_is_not_touched(
    original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    before = contents(original)

    looked = contents(copy)
    folder = resolve_model("models:/mantis@candidate", uri(copy))
    assert folder.is_relative_to(copy)
    found = lookup.stages(opened(copy), lookup.find_pipeline(opened(copy), "latest"))
    assert {Path(stage.folder).parent for stage in found.values()} == {copy / "stages"}
    assert contents(copy) == looked  # looking writes nothing

    assert register(opened(copy), "latest")["version"] == "1"
    promote(opened(copy), "1")
    assert resolve_model("models:/mantis@champion", uri(copy)).is_relative_to(copy)
    assert contents(original) == before


def test_a_moved_root_has_its_models(original: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    original.rename(moved)
    assert resolve_model("models:/mantis-client/1", uri(moved)).is_relative_to(moved)
    assert register(opened(moved), "latest")["version"] == "1"
    assert not original.exists()
    assert [stage["name"] for stage in lineage(opened(moved), "latest")["stages"]] == list(KEYED)


def test_lost_files_are_written_again_under_the_same_version(
    original: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    original.rename(moved)
    shutil.rmtree(moved / "mlartifacts")
    with pytest.raises(RegistryError, match="`mantis register RUN` writes them again"):
        resolve_model("models:/mantis/1", uri(moved))
    assert register(opened(moved), "latest")["version"] == "1"
    for name in part_names("mantis").values():
        folder = resolve_model(f"models:/{name}@candidate", uri(moved))
        assert folder.is_relative_to(moved / "mlartifacts")
        assert all((folder / file).is_file() for file in CHECKPOINT_FILES)
    assert len(models(opened(moved))) == 1
    assert not original.exists()


def test_a_stage_that_was_not_copied_is_named_and_not_read_from_the_original(
    original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    shutil.rmtree(next((copy / "stages").glob("stage2-*")))
    with pytest.raises(RegistryError, match=f"there is no {copy}/stages/stage2-.*result.json"):
        register(opened(copy), "latest")
