"""The same rows give the same loss, gradient, figures and errors on 1, 2 and 4 workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.root import ROOT

RECIPES = (
    "stage1/flat",
    "stage1/heads",
    "stage2/flat",
    "stage2/heads",
    "stage2/flat, several classes",
    "per_task",
    "teacher/flat",
    "teacher/heads",
    "individual",
)
EPOCHS = ("epochs/many", "epochs/few")
pytestmark = pytest.mark.timeout(1200)
Found = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each number of workers found, by name; see many_workers.py."""
    folder = tmp_path_factory.mktemp("many_workers")
    script = ROOT / "tests" / "mantis_core" / "many_workers.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        workers: json.loads((folder / f"workers{workers}.json").read_text())
        for workers in (1, 2, 4)
    }


def test_the_script_compares_every_recipe(found: Found) -> None:
    assert set(found[1]) == {*RECIPES, *EPOCHS, "failure"}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_has_the_same_loss_and_gradient_on_any_number_of_workers(
    recipe: str, workers: int, found: Found
) -> None:
    alone, together = found[1][recipe], found[workers][recipe]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["gradient"] < 1e-5


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("rows", EPOCHS)
def test_holdout_figures_do_not_depend_on_shares_of_rows_even_empty_ones(
    rows: str, workers: int, found: Found
) -> None:
    alone, together = (found[each][rows]["history"] for each in (1, workers))
    assert len(alone) == 3
    for expected, epoch in zip(alone, together, strict=True):
        assert any(name.startswith("holdout/loss/") for name in expected)
        assert epoch == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("rows", EPOCHS)
def test_the_epoch_and_the_threshold_are_the_same_on_any_number_of_workers(
    rows: str, workers: int, found: Found
) -> None:
    assert found[workers][rows]["best"] == found[1][rows]["best"]
    threshold = found[1][rows]["threshold"]
    assert 0 < threshold < 0.5
    assert found[workers][rows]["threshold"] == pytest.approx(threshold, rel=1e-5)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_loss_that_is_not_finite_on_one_worker_ends_all_at_the_same_step(
    workers: int, found: Found
) -> None:
    told = found[workers]["failure"]["told"]
    assert len(told) == workers
    assert len(set(told)) == 1
    assert "at step 1: lower the learning rate" in told[0]
