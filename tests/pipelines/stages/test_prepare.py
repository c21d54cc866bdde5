"""What the stage `prepare` says at its end."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_prep.manifest import Manifest, SplitInfo
from data_prep.prepare import shards
from pipelines.stages.prepare import result_of, run
from pipelines.terminal.console import Console


def manifest(**values: Any) -> Manifest:
    splits = {"train": SplitInfo(rows=11, bytes=0, shards=())}
    nothing: dict[str, Any] = {"tasks": (), "classes": (), "class_names": (), "sources": ()}
    return Manifest(
        **nothing,
        **{"image_size": (8, 8), "single_class": True, "seed": 0, "splits": splits},
        **{"unassigned": {}, "rejected": 2, "fingerprint": "f", **values},
    )


def test_remarks_stand_on_the_console_and_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifest(remarks=("no val image of task pets", "one more"))
    monkeypatch.setattr(shards, "prepare", lambda *_, **__: found)
    stream = io.StringIO()
    settings = SimpleNamespace(data=None, seed=0)
    spec = SimpleNamespace(name="prepare", settings=settings, folder="")
    context = SimpleNamespace(console=Console(stream), table=None)
    result = run(cast(Any, spec), cast(Any, context))
    assert stream.getvalue() == "prepare: no val image of task pets\nprepare: one more\n"
    assert result["remarks"] == ["no val image of task pets", "one more"]


def test_images_of_no_task_are_in_the_summary() -> None:
    assert result_of(manifest())["summary"] == "11 train, 2 rejected"
    dropped = manifest(unassigned={"train": 16, "val": 8})
    assert result_of(dropped)["summary"] == "11 train, 2 rejected, 24 of no task"
