"""Rows decoded once: the same batches, one maker, a bound on the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.read import decoded, decoding
from data_prep.read.batches import local_batches
from data_prep.read.decoding import Batch
from data_prep.reading import Augmentation, ReadingConfig


@pytest.fixture(autouse=True)
def nothing_is_too_large() -> Iterator[None]:
    decoded._TOO_LARGE.clear()
    yield
    decoded._TOO_LARGE.clear()


def read(shapes: Any, cache: Path | None, **how: Any) -> list[Batch]:
    reading = how.pop("reading", shapes.data.reading)
    how = {"global_batch": 20, "epoch": 1, **how}
    return list(local_batches(shapes.folder, shapes.manifest, reading, cache=cache, **how))


def same(left: list[Batch], right: list[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("augmentation", ["padded_crop", "random_resized_crop"])
@pytest.mark.parametrize("threads", [0, 3])
def test_batches_are_those_without_a_cache(
    shapes: Any, tmp_path: Path, augmentation: Augmentation, threads: int
) -> None:
    reading = ReadingConfig(augmentation=augmentation)
    for how in (
        {"epoch": 0},
        {"epoch": 1, "rank": 1, "world_size": 2},
        {"epoch": None},
        {"epoch": None, "split": "holdout"},
    ):
        own = {"reading": reading, "threads": threads, **how}
        same(read(shapes, tmp_path / "cache", **own), read(shapes, None, **own))
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2  # train and holdout


def test_a_file_is_decoded_once(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(shapes, tmp_path)
    monkeypatch.setattr(decoding, "_open", None)  # nothing can be decoded from here on
    same(read(shapes, tmp_path), first)
    with pytest.raises(TypeError):
        read(shapes, tmp_path / "elsewhere")


def test_rows_are_read_on_although_their_folder_is_removed(shapes: Any, tmp_path: Path) -> None:
    first = read(shapes, tmp_path)
    for folder in tmp_path.glob("[!.]*"):
        shutil.rmtree(folder)
    same(read(shapes, tmp_path), first)
    assert not list(tmp_path.glob("[!.]*"))


SCRIPT = """
import sys
from pathlib import Path
from data_prep.manifest import read_manifest
from data_prep.read import decoded
from data_prep.read.batches import local_batches
from data_prep.reading import ReadingConfig

made = decoded._make
decoded._make = lambda *given: (print("made", flush=True), made(*given))
folder, cache = sys.argv[1:]
manifest = read_manifest(folder)
rows = list(local_batches(folder, manifest, ReadingConfig(), global_batch=20, cache=Path(cache)))
print(sum(len(batch["row_id"]) for batch in rows))
"""


def test_processes_that_start_together_make_one(shapes: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, shapes.folder, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0].split() for process in started]
    assert sum(words.count("made") for words in said) == 1
    assert {words[-1] for words in said} == {str(shapes.manifest.split("train").rows)}


def test_what_a_killed_process_left_is_made_anew(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(shapes, None)

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(decoded.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            read(shapes, tmp_path)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    same(read(shapes, tmp_path), expected)
    assert not list(tmp_path.glob(".*.part"))


def test_the_folder_used_longest_ago_makes_room(shapes: Any, tmp_path: Path) -> None:
    read(shapes, tmp_path)
    (train,) = tmp_path.glob("[!.]*")
    whole = (train / decoded.PIXELS).stat().st_size
    for name, age_s in (("old", 100), ("older", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / decoded.PIXELS).write_bytes(bytes(whole))
        os.utime(tmp_path / name, times=(0, time.time() - age_s))
    holdout = {"split": "holdout", "epoch": None}
    size = whole * shapes.manifest.split("holdout").rows // shapes.manifest.split("train").rows
    reading = ReadingConfig(cache_gib=(2 * whole + size + 1000) / 2**30)
    read(shapes, tmp_path, reading=reading, **holdout)
    kept = {each.name for each in tmp_path.glob("[!.]*")}
    assert "older" not in kept
    assert {train.name, "old"} < kept


@pytest.mark.parametrize("why", ["limit", "disk"])
def test_what_has_no_room_is_decoded_in_every_epoch(
    why: str,
    shapes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gib = 20.0
    if why == "limit":
        gib = 1e-6
    else:
        monkeypatch.setattr(decoded, "SPARE_BYTES", 2**60)
    reading = ReadingConfig(cache_gib=gib)
    for _ in range(2):
        same(read(shapes, tmp_path, reading=reading), read(shapes, None, reading=reading))
    said = {"limit": "data.cache_gib allows", "disk": "GiB left"}[why]
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert said in warning.getMessage()
    assert not list(tmp_path.glob("[!.]*"))


def test_a_damaged_shard_is_no_cache(shapes: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        list(
            local_batches(
                str(tmp_path / "gone"),
                shapes.manifest,
                shapes.data.reading,
                global_batch=20,
                cache=tmp_path / "cache",
            )
        )
    assert not list((tmp_path / "cache").glob("[!.]*"))
