"""The files of a search: complete, readable by machines, one page that fetches nothing."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.search.journal import TrialRecord, finished_points
from pipelines.search.points import pareto_front
from pipelines.search.report import hypervolume_over_time, write_search_report
from pipelines.search.result import FrontPoint, SearchResult
from pipelines.search.sampler import propose
from tests.pipelines.search_bench import PARETO, REFERENCE, joint, learned


def trials() -> dict[int, TrialRecord]:
    """Eight trials: finished, but for one stopped and one failed."""
    found = {}
    for number in range(8):
        params = propose(
            joint(), (), number, kind="random", objective=PARETO, seed=0, startup_trials=1
        )
        history = {epoch: learned(params, epoch) for epoch in range(1, 10)}
        began = 100.0 * number
        done = TrialRecord(
            number, params, 0.5, {}, f"run{number}", "finished", "", history, history[9], began
        )
        found[number] = replace(done, ended=began + 60)
    one = {1: found[3].epochs[1]}
    found[3] = replace(found[3], state="stopped", epochs=one, figures={}, reason="<too> dear")
    found[5] = replace(found[5], state="failed", epochs={}, figures={}, reason="loss is nan")
    return found


def result(records: dict[int, TrialRecord]) -> SearchResult:
    points = finished_points(records)
    front = tuple(
        FrontPoint(
            key[0],
            points[key].wire_bytes,
            points[key].top1,
            dict(records[key[0]].params),
            f"run{key[0]}",
            level=points[key].level,
        )
        for key in pareto_front(points)
    )
    counts = {"finished": 6, "stopped": 1, "failed": 1, "equal": 0}
    return SearchResult(
        "run", "/r", "/r/s", counts, front, 1.0, 3, 55, {5: "loss is nan"}, 1, 9.0, 0.01
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, records = tmp_path_factory.mktemp("search"), trials()
    write_search_report(
        folder,
        result(records),
        records,
        joint(),
        reference=REFERENCE,
        epoch=1,
        title="tiny <joint>",
    )
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_trial_is_a_row_and_the_front_is_a_table_by_rising_bytes(written: Path) -> None:
    every, front = rows(written / "trials.csv"), rows(written / "front.csv")
    assert [row["trial"] for row in every] == [str(number) for number in range(8)]
    assert {row["state"] for row in every} == {"finished", "stopped", "failed"}
    assert every[5]["wire_bytes"] == ""
    assert every[5]["reason"] == "loss is nan"
    sizes = [float(row["wire_bytes"]) for row in front]
    assert sizes == sorted(sizes)
    assert {row["trial"] for row in front} == {
        row["trial"] for row in every if row["on_front"] == "True"
    }
    assert set(joint()) <= set(front[0])


def test_each_rate_of_a_trial_is_a_row(tmp_path: Path) -> None:
    records = trials()
    figures = {
        "holdout/level-0/bits": 800.0,
        "holdout/level-0/top1": 0.99,
        "holdout/level-4/bits": 8.0,
        "holdout/level-4/top1": 0.98,
    }
    records[2] = replace(records[2], figures={**records[2].figures, **figures})
    write_search_report(
        tmp_path, result(records), records, joint(), reference=REFERENCE, epoch=1, title="levels"
    )
    every, front = rows(tmp_path / "trials.csv"), rows(tmp_path / "front.csv")
    levels = [(row["level"], row["wire_bytes"]) for row in every if row["trial"] == "2"]
    assert levels == [("0", "111.0"), ("4", "12.0")]
    assert [(row["trial"], row["level"]) for row in front] == [("2", "4"), ("2", "0")]
    assert [
        each["level"] for each in json.loads((tmp_path / "search.json").read_text())["front"]
    ] == [4, 0]


def test_the_json_holds_the_front_and_the_hypervolume_over_time(written: Path) -> None:
    content = json.loads((written / "search.json").read_text())
    assert len(content["front"]) == len(rows(written / "front.csv"))
    volumes = [row["hypervolume"] for row in content["hypervolume_over_time"]]
    assert len(volumes) == 8
    assert volumes == sorted(volumes)
    assert volumes[0] > 0
    assert set(content["importance"]) == {"bits", "top1"}
    assert not {"root", "folder"} & set(content)


def test_hypervolume_counts_epochs_of_stopped_trials_but_not_their_points() -> None:
    records = trials()
    progress = hypervolume_over_time(records, REFERENCE)
    assert progress[3]["epochs"] == progress[2]["epochs"] + 1
    assert progress[3]["hypervolume"] == progress[2]["hypervolume"]


def test_the_page_is_whole_and_fetches_nothing(written: Path) -> None:
    page = (written / "search.html").read_text()
    assert "tiny &lt;joint&gt;" in page
    assert "&lt;too&gt; dear" in page
    assert page.count("<svg") == 2
    assert "mathdefault" not in page  # matplotlib's own labels of powers, never rendered here
    assert page.count("viewBox=") == 2
    assert "prefers-color-scheme: dark" in page
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page.replace("http://www.w3.org", ""), outside
    assert (written / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_without_a_finished_trial_still_has_its_files(tmp_path: Path) -> None:
    records = {5: trials()[5]}
    empty = replace(result(trials()), front=())
    write_search_report(
        tmp_path, empty, records, joint(), reference=REFERENCE, epoch=1, title="nothing"
    )
    assert rows(tmp_path / "front.csv") == []
    assert json.loads((tmp_path / "search.json").read_text())["importance"] == {}
