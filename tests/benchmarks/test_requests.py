"""benchmarks/requests: rows by request, what asking saves, and cells that can be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.requests import table
from benchmarks.requests.cells import CELLS, COLOURS, settings_of
from benchmarks.requests.plot import plot
from mantis_core.tasks import TaskSpec
from pipelines.chain.plan import make_plan
from pipelines.evaluation.split_pass import Evaluated
from tests.root import ROOT

TASKS = (
    TaskSpec("red", "classification", 2),
    TaskSpec("blue", "classification", 2),
    TaskSpec("ground", "segmentation", 2),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of each comparison take seconds."""
    monkeypatch.setattr(table, "REPLICATES", 50)
    monkeypatch.setattr("mantis_core.measure.bd_rate.REPLICATES", 50)


def answers(size: float = 10.0) -> dict[str, Any]:
    """Of two images; the second has no task `blue`."""
    count = 2
    return {
        "class_label": np.full(count, -1),
        "class_index": np.full(count, -1),
        "labels": np.array([[1, 0, -1], [1, -1, -1]]),
        "task_mask": np.array([[True, True, True], [True, False, True]]),
        "predicted": np.array([[1, 1, -1], [1, -1, -1]]),
        "decoded": np.ones((count, 3), bool),
        "probabilities": np.full((count, 3), -1.0),
        "answered": np.zeros(count, bool),
        "client_class": np.full(count, -1),
        "wire_bytes": np.full(count, size + 9),
        "session_bytes": np.full(count, size),
        "payload_bytes": np.full(count, size - 2),
        "estimated_bits": np.full(count, 8 * size),
        "request_wire_bytes": np.array([[4.0, 5.0, 6.0]] * count) + 9,
        "request_session_bytes": np.array([[4.0, 5.0, 6.0], [6.0, 5.0, 8.0]]),
        "client_macs": np.full(count, 1000),
        "client_bytes": np.full(count, 50),
        "confusion/ground": np.array([np.array([4, 0, 0, 0, 4, 0]).tobytes(), b""], object),
    }


def test_a_row_has_bytes_and_accuracy_of_each_request() -> None:
    found = Evaluated({"stage2": answers()}, TASKS, single_class=False, image_size=(4, 4))
    about = {"point": "p", "cell": "c", "kind": "mantis", "seed": 0, "rate_weight": 1e-3}
    about |= {"level": 0, "quality": None, "scale": None, "commit": "abc", "key": "k"}
    table.append(table.row_of(about, found, "stage2"))
    (row,) = table.read()
    assert row["by_request"] == {"red": [5.0, 1.0], "blue": [5.0, 0.0], "ground": [7.0, 1.0]}
    assert (row["accuracy"], row["session_bytes"], row["client_macs"]) == (
        pytest.approx(2 / 3),
        10,
        1000,
    )
    images = table.read_images("p")
    assert images["hit"].tolist() == [0.5, 1.0]  # one of two questions right; one of one
    assert images["session_bytes"].tolist() == [10, 10]


def study(kinds: dict[str, float], *, seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """Rows of curves of four points, at the same accuracies, whose bytes differ by a factor."""
    rows = []
    for kind, factor in kinds.items():
        for seed in seeds:
            for level, (size, share) in enumerate(((80, 0.9), (40, 0.8), (20, 0.7), (10, 0.6))):
                point = f"{kind}-{seed}-{level}"
                random = np.random.default_rng([seed, level])
                sizes = factor * size * (1 + 0.1 * random.standard_normal(400))
                hits = (random.random((400, 4)) < share).mean(axis=1)
                table.write_images(point, sizes, sizes, hits, sizes)
                own = {"point": point, "kind": kind, "seed": seed, "rate_weight": level}
                own |= {"quality": None, "scale": None, "accuracy": hits.mean(), "questions": 1}
                own |= {"client_macs": None, "client_bytes": None, "wire_bytes": sizes.mean()}
                own |= {"session_bytes": sizes.mean(), "payload_bytes": sizes.mean()}
                rows.append({**own, "by_request": {"red": [sizes.mean(), share]}})
    return rows


def test_a_saving_is_told_with_its_interval() -> None:
    rows = study({"none": 1.0, "mantis": 0.4, "per_task": 0.35})
    found = {(f["test"], f["against"]): f for f in table.savings(rows, "payload_bytes")}
    assert set(found) == {("mantis", "none"), ("per_task", "none"), ("mantis", "per_task")}
    saving = found["mantis", "none"]
    assert saving["mean"] == pytest.approx(-60, abs=0.01)
    assert saving["low"] < -59.9 < saving["high"] + 0.2
    assert saving["seeds"] == [0, 1]
    assert found["mantis", "per_task"]["mean"] == pytest.approx(100 * (0.4 / 0.35 - 1), abs=0.01)


def test_bytes_are_compared_at_one_accuracy_too() -> None:
    rows = study({"none": 1.0, "mantis": 0.4})
    (found,) = table.savings(rows, "session_bytes")
    at = found["at"]
    assert at["mean"] == pytest.approx(-60, abs=0.01)
    assert at["low"] <= at["mean"] <= at["high"] < -59.5
    most = [r["accuracy"] for r in rows if r["rate_weight"] == 0]
    assert at["accuracy"] == pytest.approx(100 * min(most) - 1, abs=0.01)


def test_curves_that_begin_high_are_compared_in_the_middle_of_their_range() -> None:
    hits = np.arange(1000)[None, :] < np.array([[990], [996], [999]])
    sizes = np.array([[10.0], [20.0], [40.0]]) * np.ones((1, 1000))
    ours, theirs = table.Curve(sizes, hits), table.Curve(2 * sizes, hits)
    found = table.at_equal_accuracy([(ours, theirs), (theirs, theirs)])
    assert found is not None
    assert found["accuracy"] == pytest.approx((99.0 + 99.9) / 2, abs=0.01)
    assert found["mean"] == pytest.approx(-25)
    assert found["by_seed"] == [-50, 0]
    above = table.Curve(sizes[:1], np.ones((1, 1000), bool))
    assert table.at_equal_accuracy([(ours, above)]) is None


def test_image_codecs_of_all_sizes_stand_for_one_curve() -> None:
    rows = study({"mantis": 0.1, "webp": 1.0, "jpeg": 2.0}, seeds=(0,))
    smaller = [{**row, "scale": 0.5} for row in study({"avif": 0.5}, seeds=(0,))]
    for row in [*rows, *smaller]:
        if row["kind"] != "mantis":
            row |= {"quality": row["rate_weight"], "rate_weight": None}
    found = {
        (f["test"], f["against"]): f for f in table.savings([*rows, *smaller], "payload_bytes")
    }
    assert found["mantis", "codecs"]["mean"] == pytest.approx(100 * (0.1 / 0.5 - 1), abs=0.01)
    assert len(table.newest([*rows, *smaller])) == 16
    assert {point["scale"] for point in table.points(smaller)} == {0.5}


def test_requests_for_a_mask_are_not_compared_by_labels_alone() -> None:
    rows = [{**row, "questions": 0} for row in study({"none": 1.0, "mantis": 0.4})]
    assert table.savings(rows, "session_bytes") == []


def test_a_later_recipe_replaces_another() -> None:
    rows = study({"mantis": 1.0})
    later = {**rows[0], "point": "new"}
    found = table.newest([*rows, later])
    assert len(found) == len(rows)
    assert found[0]["point"] == "new"


def test_too_few_points_are_refused_and_not_guessed() -> None:
    rows = [r for r in study({"none": 1.0, "mantis": 0.5}) if r["rate_weight"] < 3]
    (found,) = table.savings(rows, "session_bytes")
    assert "refused" in found
    assert "mean" not in found


def test_points_are_means_over_seeds() -> None:
    rows = study({"mantis": 1.0})
    found = table.points(rows)
    assert [point["rate_weight"] for point in found] == [0, 1, 2, 3]
    assert found[0]["seeds"] == [0, 1]
    both = [row["session_bytes"] for row in rows if row["rate_weight"] == 0]
    assert found[0]["session_bytes"] == pytest.approx(np.mean(both), abs=1e-4)
    assert found[0]["by_request"]["red"][1] == 0.9
    assert plot({"a": {"points": found}, "b": {"points": found}}).startswith(b"\x89PNG")
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_is_asked_and_has_its_rivals(name: str) -> None:
    cell = CELLS[name]
    settings = settings_of(cell, 1, ["storage.root=runs"])
    assert (settings.model.requests, settings.seed) == ("asked", 1)
    assert len(settings.tasks) == settings.model.max_active_tasks == cell.questions
    assert settings.evaluate.baselines == cell.baselines
    assert len(settings.stage2.rate_weights) >= 4  # a BD-rate needs four points
    assert len(settings.evaluate.codecs["webp"]) >= 4


@pytest.mark.parametrize("things", [2, 4, 8])
def test_scenes_of_several_sizes_can_be_planned(things: int) -> None:
    plan = make_plan(settings_of(CELLS[f"scenes-{things}"], 0, ["storage.root=runs"]))
    assert [task.name for task in plan.table.tasks] == list(COLOURS[:things])
    kinds = {arm.kind for arm in plan.arms}
    assert kinds >= {"mantis", "webp", *CELLS[f"scenes-{things}"].baselines}
