"""One, two, four workers and an elastic number: the same rows in every step."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mantis_core.training.loop import TrainingError
from pipelines.training.worker import epoch_record
from tests.pipelines.experiment import last_json, mantis, paint, planned_hashes, write_config

COUNTS = {"1": "0.5", "2": "0.5", "4": "0.25", "[1, 2]": "0.5"}  # and CPUs of a worker


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rows_consumed_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    paint(tmp_path / "images", train=20)
    config = write_config(tmp_path)
    for number, (workers, cpus) in enumerate(COUNTS.items()):
        asked = [f"cluster.workers={workers}", f"cluster.cpus_per_worker={cpus}"]
        options = [*asked, "stage1.epochs=2", f"storage.root={tmp_path}/{number}"]
        done = mantis("stage1", "--config", str(config), "--json", *options, folder=tmp_path)
        consumed = last_json(done)["stages"]["stage1"]["rows"]["sha256"]
        assert consumed == planned_hashes(config, "stage1", *options)


def test_an_epoch_in_which_a_row_came_twice_is_not_kept() -> None:
    config = SimpleNamespace(batch_size=16)
    session: Any = SimpleNamespace(steps_per_epoch=6, config=config, rows_sha256="ab")
    manifest: Any = SimpleNamespace(split=lambda name: SimpleNamespace(rows=100))
    record = epoch_record(session, manifest, {"train/rows": 96, "train/loss": math.inf})
    assert record == {"train/rows": 96, "train/rows_left_out": 4, "train/rows_sha256": "ab"}
    with pytest.raises(TrainingError, match="96 rows had 95 different ones"):
        epoch_record(session, manifest, {"train/rows": 95})
