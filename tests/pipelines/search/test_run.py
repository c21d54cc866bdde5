"""What a search refuses before any work."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.search.result import SearchOptions
from pipelines.search.run import run_search
from pipelines.settings.errors import SettingsError
from pipelines.settings.sections import Settings


def test_a_search_over_segmentations_alone_is_refused(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {
            "data": {
                "sources": [{"kind": "shapes", "train_rows": 200, "val_rows": 20, "size": 32}],
                "image_size": 32,
            },
            "tasks": [{"name": "regions", "kind": "segmentation", "labels": list("abcd")}],
            "teacher": {"weights": "train"},
            "storage": {"root": str(tmp_path)},
        }
    )
    options = SearchOptions("joint", trials=2)
    with pytest.raises(SettingsError, match=r"only segmentations.* add a classification task"):
        run_search(settings, options, stream=io.StringIO(), config_name="c")
    assert not list(tmp_path.iterdir())
