"""Two workers of one training: they agree on figures, weights and rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mantis_core.training.meter import hash_of_rows
from tests.root import ROOT


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_workers")
    script = ROOT / "tests" / "mantis_core" / "two_workers.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_workers_agree_on_finite_figures(two_workers: list[dict[str, Any]]) -> None:
    first, second = (result["figures"] for result in two_workers)
    assert first == second
    assert all(math.isfinite(value) for value in first.values())


def test_two_workers_with_images_of_other_tasks_end_with_the_same_weights(
    two_workers: list[dict[str, Any]],
) -> None:
    first, second = (result["weights"] for result in two_workers)
    assert first == second


def test_rows_of_uneven_shares_are_gathered_in_rank_order(
    two_workers: list[dict[str, Any]],
) -> None:
    assert [result["rows"] for result in two_workers] == [[0.0, 1.0, 1.0]] * 2


def test_the_rows_of_all_workers_make_one_hash(two_workers: list[dict[str, Any]]) -> None:
    assert [result["figures"]["train/rows"] for result in two_workers] == [16, 16]
    alone = torch.tensor([[row // 8, row] for row in range(16)])
    assert {result["sha256"] for result in two_workers} == {hash_of_rows(alone)}
