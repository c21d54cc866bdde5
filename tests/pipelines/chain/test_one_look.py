"""A command looks at its sources once: for the fingerprint, for its remarks and for prepare."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.prepare.shards import prepare
from data_prep.sources.parquet import ParquetFiles
from data_prep.sources.remembering import one_look, remembered
from data_prep.sources.webdataset import WebDataset
from pipelines.__main__ import app
from pipelines.chain.plan import make_plan
from pipelines.chain.preflight import Preflight, listed_rows
from pipelines.settings.reading import load_settings
from tests.data_prep.conftest import encode, picture
from tests.data_prep.rows import write_parquet
from tests.data_prep.sources.test_webdataset import write_tar

ROWS = {"train": 8, "val": 4}
SOURCES = {
    "image_folder": {"kind": "image_folder"},
    "parquet": {"kind": "parquet", "train": "train-*.parquet", "val": "val-*.parquet"},
    "auto": {"kind": "auto", "train": "train-*.parquet", "val": "val-*.parquet"},
    "webdataset": {"kind": "webdataset", "train": "train-*.tar", "val": "val-*.tar"},
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two classes as each kind of source holds them, every kind in its own folder."""
    for number, (split, rows) in enumerate(ROWS.items()):
        content = [encode(picture(100 * number + row), "PNG") for row in range(rows)]
        for kind in ("auto", "parquet"):
            for half in (0, 1):
                columns = {"image": content[half::2], "wnid": ["ab"[half]] * (rows // 2)}
                write_parquet(tmp_path / f"{kind}/{split}-{half}.parquet", **columns)
        members: dict[str, bytes] = {}
        for row, image in enumerate(content):
            folder = tmp_path / f"image_folder/{split}" / "ab"[row % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.png").write_bytes(image)
            members |= {f"{row}.png": image, f"{row}.cls": b"ab"[row % 2 : row % 2 + 1]}
        (tmp_path / "webdataset").mkdir(exist_ok=True)
        write_tar(tmp_path / f"webdataset/{split}-0.tar", members)
    return tmp_path


def written(images: Path, kind: str) -> Path:
    config = {
        "data": {"root": str(images / kind), "sources": [SOURCES[kind]], "image_size": 16},
        "tasks": [{"name": "letters", "classes": "all"}],
        "teacher": {"weights": "train"},
        "evaluate": {"baselines": ["none"]},
        "tracking": {"enabled": False},
        "storage": {"root": str(images / "runs")},
    }
    path = images / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def inline(tables: Any, do: Callable[..., Any], job: Any) -> Any:
    return (do(table, job=job) for table in tables)


@pytest.fixture
def looks(images: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder was listed, and each file opened to list its images."""
    found: Counter[str] = Counter()
    scandir = os.scandir

    def counting(path: Any) -> Any:
        if str(path).startswith(str(images)):
            found[str(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    for kind, name in ((ParquetFiles, "_labels_of"), (WebDataset, "_samples")):
        read = getattr(kind, name)

        def opening(self: Any, where: str, read: Callable[..., Any] = read) -> Any:
            found[where] += 1
            return read(self, where)

        monkeypatch.setattr(kind, name, opening)
    return found


EXPECTED = {
    "image_folder": {
        "train": 2,  # its folders, and images that stand in none
        "val": 2,
        **{f"{split}/{name}": 1 for split in ROWS for name in "ab"},
    },
    "parquet": {"": 2, **{f"{split}-{half}.parquet": 1 for split in ROWS for half in (0, 1)}},
    "auto": {"": 2, **{f"{split}-{half}.parquet": 1 for split in ROWS for half in (0, 1)}},
    "webdataset": {"": 2, **{f"{split}-0.tar": 1 for split in ROWS}},
}
"""A folder of files is listed once for each pattern."""


@pytest.mark.parametrize("kind", SOURCES)
def test_a_plan_its_checks_and_prepare_list_all_files_once(
    kind: str, images: Path, looks: Counter[str]
) -> None:
    settings = load_settings(written(images, kind))
    with one_look():
        plan = make_plan(settings)
        Preflight(plan, plan.specs[:1], dry=True).check()
        listed_rows(plan)
        manifest = prepare(
            settings.data, plan.table, seed=0, output=plan.specs[0].folder, run=inline
        )
    folder = images / kind
    expected = {
        str(folder / path) if path else str(folder): n for path, n in EXPECTED[kind].items()
    }
    assert {path: n for path, n in looks.items() if path.startswith(str(folder))} == expected
    alone = prepare(settings.data, plan.table, seed=0, output=str(images / "alone"), run=inline)
    assert alone == manifest
    assert make_plan(settings).key == plan.key


def test_a_dry_run_lists_all_files_once(images: Path, looks: Counter[str]) -> None:
    config = written(images, "image_folder")
    done = CliRunner().invoke(app, ["prepare", "--config", str(config), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "train: 8 images (a 4, b 4)" in done.output
    assert looks[str(images / "image_folder/train/a")] == 1


def test_a_command_forgets_the_sources_once_they_are_prepared(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(written(images, "image_folder"))
    with one_look():
        plan = make_plan(settings)
        remembered(("a word",), lambda: "old")
        prepare(settings.data, plan.table, seed=0, output=plan.specs[0].folder, run=inline)
        assert remembered(("a word",), lambda: "new") == "new"
        Preflight(plan, []).check(plan.specs[0].folder)
        assert remembered(("a word",), lambda: "newer") == "newer"


def test_without_a_block_nothing_is_remembered() -> None:
    words = iter("abcd")
    assert [remembered(("word",), lambda: next(words)) for _ in range(2)] == ["a", "b"]
    with one_look():
        assert remembered(("word",), lambda: next(words)) == "c"
        with one_look():
            assert remembered(("word",), lambda: next(words)) == "c"
        assert remembered(("word",), lambda: next(words)) == "c"
    assert remembered(("word",), lambda: next(words)) == "d"
