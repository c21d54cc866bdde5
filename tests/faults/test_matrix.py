"""Every cell of the fault matrix: it recovers, or ends saying how to resume, and does so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.matrix import CAMPAIGNS, Cell, ClusterRay, LocalRay, Moment, run_matrix, table


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "moments", [moments for _, moments in CAMPAIGNS], ids=["chain", "raylet", "search"]
)
def test_every_cell_recovers_or_says_how_to_resume(moments: list[Moment], tmp_path: Path) -> None:
    with ClusterRay() as ray:
        rows, wrong = run_matrix([moment.cell for moment in moments], tmp_path, ray)
    assert len(rows) == len(moments)
    assert wrong == [], table(rows)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_the_ray_a_command_starts_itself_is_a_cluster_too(tmp_path: Path) -> None:
    cells = [Cell("stage1", "gcs"), Cell("stage2", "raylet"), Cell("tune", "raylet")]
    rows, wrong = run_matrix(cells, tmp_path, LocalRay())
    assert [row.recovered for row in rows] == [False] * len(cells)
    assert wrong == [], table(rows)
