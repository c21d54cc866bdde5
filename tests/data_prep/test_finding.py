"""Fingerprints of sources, and sources for bare paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.finding import source_fingerprint, source_for_path
from data_prep.tasks import resolve_tasks
from tests.data_prep.rows import listed, write_parquet


def test_the_fingerprint_follows_content_not_place_or_date(
    image_folder: Path, folder_data: DataConfig, animals: tuple[TaskConfig, ...], tmp_path: Path
) -> None:
    table = resolve_tasks(animals, folder_data)
    first = source_fingerprint(folder_data, table)
    shutil.copytree(image_folder, tmp_path / "moved")
    moved = folder_data.model_copy(update={"root": str(tmp_path / "moved")})
    assert source_fingerprint(moved, table) == first
    (tmp_path / "moved/val/n02085620/0.JPEG").write_bytes(b"other size")
    assert source_fingerprint(moved, table) != first


def test_a_bare_path_is_scored_as_val(image_folder: Path, tmp_path: Path) -> None:
    like = DataConfig(sources=({"kind": "shapes"},))
    folder = source_for_path(str(image_folder), like)
    assert len(listed(folder, tmp_path, "val")) == 12
    assert len(listed(source_for_path(str(image_folder / "train"), like), tmp_path, "val")) == 36
    write_parquet(tmp_path / "p/x.parquet", picture=[b"x"], kind=["n1"], image=[b"y"], label=[3])
    plain = source_for_path(str(tmp_path / "p/x.parquet"), like)
    assert listed(plain, tmp_path, "val") == [("x.parquet:0", ["3"])]
    like = DataConfig(sources=({"kind": "parquet", "image": "picture", "class_column": "kind"},))
    named = source_for_path(str(tmp_path / "p"), like)
    assert listed(named, tmp_path, "val") == [("x.parquet:0", ["n1"])]
    assert next(named.read(str(tmp_path), named.listing(str(tmp_path), "val"))).image == b"x"
    with pytest.raises(DataError, match="nothing to score"):
        source_for_path(str(tmp_path / "absent"), like)
