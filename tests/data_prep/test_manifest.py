"""The manifest of a prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.manifest import Manifest, Task, read_manifest, write_manifest


def test_a_folder_without_manifest_is_not_a_prepared_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare the data again"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="has format 99"):
        read_manifest(str(tmp_path))


def test_a_folder_of_earlier_code_is_still_read(tmp_path: Path) -> None:
    """Its manifest has counts that nothing ever read, and its images are JPEG and PNG."""
    now = Manifest(
        image_size=(32, 32),
        tasks=(Task("pets", "classification", ("cat", "dog"), (0, 1), 2),),
        classes=("cat", "dog"),
        class_names=("cat", "dog"),
        single_class=True,
        seed=0,
        splits={},
        unassigned={},
        rejected=0,
        fingerprint="f",
        sources=(),
    )
    write_manifest(str(tmp_path), now)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps({**record, "class_counts": {"train": {"cat": 3}}, "task_counts": {}})
    )
    assert read_manifest(str(tmp_path)) == now
    path.write_text(json.dumps({**record, "format_version": 1}))
    assert read_manifest(str(tmp_path)) == now.model_copy(update={"format_version": 1})
    path.write_text(json.dumps({**record, "unknown": 1}))
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(str(tmp_path))
