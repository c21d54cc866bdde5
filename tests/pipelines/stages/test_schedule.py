"""What a plan says of rows, batches and steps, and batches that do not divide among workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.chain.plan import make_plan
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.stages.schedule import check_batches, schedule
from pipelines.stages.spec import StageSpec

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train, training: {batch_size: 32}}
stage1: {batch_size: 24}
stage2: {batch_size: 24, epochs: 3, optim: {lr: 0.002}}
evaluate: {baselines: []}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def specs(config: Path, *overrides: str) -> dict[str, StageSpec]:
    plan = make_plan(load_settings(config, [f"storage.root={config.parent}/runs", *overrides]))
    return {spec.name: spec for spec in plan.specs}


def test_rows_are_counted_to_the_last_one(config: Path) -> None:
    found = schedule(specs(config, "cluster.workers=4")["stage2"], 1000)
    assert found is not None
    assert (found.rows_per_epoch, found.rows_left_out) == (984, 16)
    assert (found.steps_per_epoch, found.steps) == (41, 123)
    assert (found.workers, found.global_batch, found.worker_batch) == ((4, 4), 24, (6, 6))
    assert str(found) == (
        "984 of 1000 rows per epoch (16 left out, others in the next), 41 steps, 123 in total; "
        "batch 24 = 4 x 6; learning rate 0.002, not scaled by workers"
    )


def test_what_is_not_known_before_prepare_is_said(config: Path) -> None:
    found = schedule(specs(config, "cluster.workers=[1, 2]")["stage2"], None)
    assert found is not None
    assert found.steps is found.rows_per_epoch is found.rows_left_out is None
    assert "known after prepare; batch 24 = 1 x 24 to 2 x 12;" in str(found)


def test_only_trainings_have_a_schedule(config: Path) -> None:
    planned = specs(config)
    trained = [name for name, spec in planned.items() if schedule(spec, 100)]
    assert trained == ["teacher", "stage1", "stage2"]


@pytest.mark.parametrize("workers", ["1", "2", "8", "[1, 2]", "[4, 4]"])
def test_workers_that_divide_every_batch_are_taken(config: Path, workers: str) -> None:
    check_batches(specs(config, f"cluster.workers={workers}").values())


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("3", "cluster.workers 3: the batch_size 32 of teacher does not divide among 3 workers"),
        ("16", r"batch_size 24 of stage1 .* among 1, 2, 3, 4, 6, 8, 12, 24\. .* multiple of 16$"),
        ("[1, 4]", r"\[1, 4\] allows every number between: .* 32 of teacher .* multiple of 12"),
        ("[5, 7]", "does not divide among 5 or 6 or 7 workers"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(config: Path, workers: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_batches(specs(config, f"cluster.workers={workers}").values())
