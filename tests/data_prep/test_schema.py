"""Settings and the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_prep.schema import DataConfig, DataError, TaskConfig, read_manifest


def test_a_classification_needs_exactly_one_way_to_name_its_classes() -> None:
    with pytest.raises(ValidationError, match="exactly one of group, classes"):
        TaskConfig(name="dogs", group="dogs", indices="151-268")
    with pytest.raises(ValidationError, match="got none"):
        TaskConfig(name="dogs")


def test_a_segmentation_refuses_classes() -> None:
    with pytest.raises(ValidationError, match="takes `labels` only"):
        TaskConfig(name="road", kind="segmentation", classes=("a", "b"))


def test_a_short_side_below_the_image_size_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"data\.short_side is 32"):
        DataConfig(sources=({"kind": "shapes"},), image_size=64, short_side=32)


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="give each a `name`"):
        DataConfig(sources=({"kind": "shapes"}, {"kind": "shapes"}))


def test_an_unknown_source_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="colour"):
        DataConfig(sources=({"kind": "shapes", "colour": 1},))


def test_a_folder_without_manifest_is_not_a_prepared_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare the data again"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="has format 99"):
        read_manifest(str(tmp_path))
