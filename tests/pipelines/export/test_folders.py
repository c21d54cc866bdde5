"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.export.folders import whole


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a").write_text("old")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for target, text in ((Path("made"), "one"), (tmp_path / "link", "two"), (folder, "three")):
        with whole(target, ("a", "b")) as partial:
            (partial / "a").write_text(text)
            assert folder.exists()
        assert (folder / "a").read_text() == text
    with pytest.raises(FileNotFoundError), whole(folder, ("a",)) as partial:
        (partial / "a").write_text((tmp_path / "gone").read_text())
    assert (folder / "a").read_text() == "three"
    rename = os.rename

    def failing(before: Any, after: Any) -> None:
        if Path(before).name == "made" and Path(after) == folder:
            raise OSError("busy")
        rename(before, after)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="busy"), whole(folder, ("a",)) as partial:
        (partial / "a").write_text("four")
    assert (folder / "a").read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "made"]
