"""benchmarks/rate_accuracy/__main__.py: what a study is made of, and its table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rate_accuracy.__main__ import main
from benchmarks.rate_accuracy.points import (
    COMPARISONS,
    FIGURES,
    append_rows,
    bd_figures,
    curves,
    plot,
    read_rows,
    summarise,
    times_smaller,
    worth_sending,
    write_images,
)
from benchmarks.rate_accuracy.protocols import EXITS_WERE_CHOSEN, PROTOCOLS, steps
from pipelines.settings.arms import ARM_KINDS
from tests.pipelines.experiment import paint, write_config


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 take seconds."""
    monkeypatch.setattr("mantis_core.measure.bd_rate.REPLICATES", 20)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("study")
    paint(folder / "images", train=2)
    overrides = ["model.detector.classes=true"]
    return list(steps(PROTOCOLS["full"], str(write_config(folder)), overrides))


def test_phases_come_one_after_the_other_each_with_all_seeds(study: list[Any]) -> None:
    assert [(step.phase, step.seed) for step in study] == [
        (phase, seed) for phase in (0, 1, 2) for seed in (0, 1, 2)
    ]
    for step in study:
        assert {arm.seed for arm in step.arms} == {step.seed}


def test_the_first_phase_is_mantis_and_none_at_every_rate(study: list[Any]) -> None:
    rates = PROTOCOLS["full"].rates
    arms = {(arm.kind, arm.rate_weight) for arm in study[0].arms}
    kinds = ("mantis", "early_exit", "none", "none_exit")
    assert arms == {(kind, rate) for kind in kinds for rate in rates}
    trained = {arm.stage for arm in study[0].arms}
    assert len(trained) == 2 * len(rates)


def test_image_codecs_are_measured_once(study: list[Any]) -> None:
    with_codecs = [
        (step.phase, step.seed) for step in study if any(a.kind == "webp" for a in step.arms)
    ]
    assert with_codecs == [(1, 0)]


def test_a_point_has_one_name_in_every_phase_and_another_for_each_seed(study: list[Any]) -> None:
    named = [{step.point_of(arm) for arm in step.arms} for step in study]
    first, again = named[0], named[3]
    assert first <= again
    assert first.isdisjoint(named[1])
    assert all(len(names) == len(step.arms) for names, step in zip(named, study, strict=True))


def row(kind: str, seed: int, rate: float, top1: float, size: float) -> dict[str, Any]:
    return {
        "point": f"{kind}-{seed}-{rate}",
        "config": "c",
        "protocol": "full",
        "kind": kind,
        "seed": seed,
        "rate_weight": rate,
        "quality": None,
        "scale": None,
        "exit_confidence": None,
        "commit": "abc",
        "key": "def",
        **dict.fromkeys(FIGURES),
        "top1": top1,
        "wire_bytes": size,
        "payload_bytes": size - 14,
        "session_bytes": size - 9,
        "classes": 100,
    }


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [row("mantis", seed, 1e-3, 0.4 + seed / 100, 80.0) for seed in (0, 1)]
    for each in rows:
        append_rows(tmp_path / "results/table.csv", [each])
    append_rows(tmp_path / "results/table.csv", [])
    found = read_rows(tmp_path / "results/table.csv")
    assert found == rows
    (point,) = summarise(found)
    assert point["seeds"] == [0, 1]
    assert point["top1"] == pytest.approx(0.405)
    assert point["top1_std"] == pytest.approx(0.00707, abs=1e-5)
    assert point["floor_bits"] > 0
    assert curves([], "wire_bytes") == {}


def test_the_curves_are_drawn() -> None:
    rows = [row(kind, 0, rate, 0.4, 50.0) for kind in ("mantis", "none") for rate in (1e-3, 1e-2)]
    assert plot(rows).startswith(b"\x89PNG")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Four points of MANTiS, of it with early exit, and of none, which needs twice the bytes."""
    monkeypatch.setattr("benchmarks.rate_accuracy.points.RESULTS", tmp_path)
    rows = []
    for kind, factor in (("mantis", 1.0), ("early_exit", 0.5), ("none", 2.0)):
        for step in range(4):
            right = np.arange(400) < 120 + 20 * step
            size = np.full(400, factor * 40 * 2**step)
            own = row(kind, 0, 1.0 + step, float(right.mean()), float(size[0]))
            write_images(own["point"], size, size - 14.25, right, size - 9)
            rows.append(own)
    return rows


def test_each_images_figures_are_read_as_they_were_written(measured: list[dict[str, Any]]) -> None:
    by_kind = curves(measured, "payload_bytes")
    assert by_kind["none"][0].sizes[:, 7].tolist() == [65.75, 145.75, 305.75, 625.75]
    assert by_kind["none"][0].hits.mean(axis=1).tolist() == [0.3, 0.35, 0.4, 0.45]
    in_session = curves(measured, "session_bytes")["none"][0]
    assert in_session.sizes[:, 7].tolist() == [71, 151, 311, 631]


def test_rows_of_before_there_were_sessions_have_no_curve_by_them(
    measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    old = [row for row in measured if row["kind"] == "none"]
    for each in old:
        each["session_bytes"] = None
        path = tmp_path / "images" / f"{each['point']}.csv.gz"
        path.write_bytes(gzip.compress(b"wire_bytes,payload_bytes,hit\n80,65.75,1\n90,75,0\n"))
    assert set(curves(measured, "session_bytes")) == {"mantis", "early_exit"}
    assert curves(measured, "wire_bytes")["none"][0].sizes[0].tolist() == [80, 90]


def of_pair(found: list[dict[str, Any]], test: str, anchor: str) -> dict[str, Any]:
    (own,) = [each for each in found if (each["test"], each["against"]) == (test, anchor)]
    return own


def test_an_arm_stands_against_what_differs_in_one_thing(measured: list[dict[str, Any]]) -> None:
    found = bd_figures(measured, "wire_bytes", accuracy=False)
    assert of_pair(found, "mantis", "none")["mean"] == pytest.approx(-50, abs=0.1)
    assert of_pair(found, "early_exit", "mantis")["mean"] == pytest.approx(-50, abs=0.1)
    assert {(each["test"], each["against"]) for each in found} == {
        ("mantis", "none"),
        ("early_exit", "mantis"),
    }


def test_every_comparison_is_of_arms_that_both_exit_or_know_the_tasks() -> None:
    for question, test, anchor in COMPARISONS:
        one, two = ARM_KINDS[test], ARM_KINDS[anchor]
        if question != "early exit":
            assert (one.asked_by == "early_exit") == (two.asked_by == "early_exit")
        knows = [kind.answers in ("oracle", "per_task") for kind in (one, two)]
        assert knows[0] == knows[1]


def test_points_below_the_clients_own_accuracy_are_in_no_figure(
    measured: list[dict[str, Any]],
) -> None:
    rows = [{**each, "client_top1": 0.32} for each in measured]
    assert {each["top1"] for each in worth_sending(rows)} == {0.35, 0.4, 0.45}
    found = bd_figures(rows, "wire_bytes", accuracy=False)
    assert all("no seed has both curves at 4 rates" in each["refused"] for each in found)
    assert worth_sending(measured) == measured  # their clients' accuracy is not known


def test_image_codecs_stand_beside_every_seed_and_networks_beside_their_own(
    measured: list[dict[str, Any]],
) -> None:
    ours = [each for each in measured if each["kind"] == "mantis"]
    copies = [{**each, "seed": 1} for each in ours]
    theirs = [each for each in measured if each["kind"] == "none"]
    files = [{**each, "kind": "webp", "quality": n} for n, each in enumerate(theirs)]
    found = bd_figures([*ours, *copies, *theirs, *files], "wire_bytes", accuracy=False)
    assert len(of_pair(found, "mantis", "none")["seeds"]) == 1
    assert len(of_pair(found, "mantis", "webp")["seeds"]) == 2


def test_a_seed_begun_does_not_take_the_figure_from_those_that_are_finished(
    measured: list[dict[str, Any]],
) -> None:
    begun = [{**each, "seed": 1} for each in measured if each["rate_weight"] != 2.0]
    found = bd_figures([*measured, *begun], "wire_bytes", accuracy=False)
    finished = bd_figures(measured, "wire_bytes", accuracy=False)
    assert found == [{**own, "unfinished": [1]} for own in finished]
    assert of_pair(found, "mantis", "none")["seeds"].keys() == {0}


def test_codecs_told_the_task_stand_beside_mantis_told_it(measured: list[dict[str, Any]]) -> None:
    told = [{**each, "kind": "oracle"} for each in measured if each["kind"] == "mantis"]
    apart = [{**each, "kind": "per_task"} for each in measured if each["kind"] == "none"]
    ours = [each for each in measured if each["kind"] == "mantis"]
    found = bd_figures([*ours, *told, *apart], "wire_bytes", accuracy=False)
    assert of_pair(found, "oracle", "per_task")["mean"] == pytest.approx(-50, abs=0.1)
    few = [each for each in told if each["rate_weight"] != 2.0]
    refused = of_pair(
        bd_figures([*ours, *few, *apart], "wire_bytes", accuracy=False), "oracle", "per_task"
    )
    assert refused["refused"] == "no seed has both curves at 4 rates"


def test_an_image_codecs_bytes_at_the_same_top1_are_told_as_a_factor() -> None:
    ours = [row("mantis", seed, 1e-3, 0.4 + seed / 50, 100.0) for seed in (0, 1)]
    files = [
        {**row("webp", 0, 0, top1, size), "rate_weight": None, "quality": size}
        for top1, size in ((0.36, 500.0), (0.46, 2000.0), (0.45, 3000.0))
    ]
    low = [{**each, "kind": "avif", "top1": each["top1"] / 2} for each in files]
    (point,) = times_smaller([*ours, *files, *low])
    assert point["seeds"] == [0, 1]
    assert point["top1"] == pytest.approx(0.41)
    assert point["wire_factor"] == {"webp": 10.0, "avif": None}
    assert point["payload_factor"]["webp"] == pytest.approx((486 * 1986) ** 0.5 / 86, abs=0.01)


def test_a_figure_has_an_interval_over_images_and_seeds_and_one_over_seeds(
    measured: list[dict[str, Any]],
) -> None:
    one = of_pair(bd_figures(measured, "wire_bytes", accuracy=False), "mantis", "none")
    assert one["low"] <= one["mean"] <= one["high"]
    assert one["t_low"] is one["t_high"] is None
    again = [{**each, "seed": 1} for each in measured]
    found = bd_figures([*measured, *again], "wire_bytes", accuracy=False)
    two = of_pair(found, "mantis", "none")
    assert two["t_low"] == two["mean"] == two["t_high"]  # two seeds with one value


def test_a_report_says_how_confidences_were_chosen_and_how_few_seeds_there_are(
    measured: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("benchmarks.rate_accuracy.__main__.RESULTS", tmp_path)
    rows = [{**r, "exit_confidence": 0.5 if r["kind"] == "early_exit" else None} for r in measured]
    append_rows(tmp_path / "rate_accuracy.csv", rows)
    program = ["rate_accuracy", "--config", "c.yaml", "--protocol", "full", "--report-only"]
    monkeypatch.setattr("sys.argv", program)
    main()
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["notes"] == [EXITS_WERE_CHOSEN]
    assert EXITS_WERE_CHOSEN in printed.err
    assert "one seed" in printed.err
