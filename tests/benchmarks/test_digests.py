"""The rows of results/ are found by their recipes; names of points, as they were and as they are.

points.csv holds every point's names: the first, the one since recipes leave out fields at their
default, and today's, since labels enter the fingerprint of the data. study_data.json holds what the
study's data gives to a plan: the tasks, and its fingerprint as it was and as it is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rate_accuracy import digests, protocols
from benchmarks.rate_accuracy.points import read_rows
from benchmarks.rate_accuracy.protocols import PROTOCOLS, Step, steps
from data_prep.manifest import Task, TaskTable
from pipelines.chain.plan import Plan, plan_stages
from pipelines.settings.sections import Settings
from tests.pipelines.fakes import same_code
from tests.root import ROOT

HERE = Path(__file__).parent


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


DATA: dict[str, Any] = json.loads((HERE / "study_data.json").read_text())
POINTS = {
    row[name]: row["point"] for row in read(HERE / "points.csv") for name in ("first", "second")
}
ROWS = read(ROOT / "results" / "rate_accuracy.csv")


def table_of(config: str) -> TaskTable:
    known = DATA[config]["task_table"]
    tasks = tuple(
        Task(t["name"], t["kind"], tuple(t["labels"]), tuple(t["class_indices"]), t["num_classes"])
        for t in known["tasks"]
    )
    ignored = tuple(map(tuple, known["ignored"]))
    names = (tuple(known[name]) for name in ("classes", "class_names", "masks"))
    return TaskTable(tasks, *names, ignored)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Step]]:
    """The steps of all protocols by config, planned without the images and the teacher's file."""
    same_code(monkeypatch)
    found: dict[str, list[Step]] = {}
    for config, known in DATA.items():

        def plan(settings: Settings, config: str = config, known: Any = known) -> Plan:
            table = table_of(config)
            return Plan(settings, table, plan_stages(settings, table, known["data_fingerprint"]))

        def weights(field: str, file: str, known: Any = known) -> str:
            return str(known["teacher_weights"])

        monkeypatch.setattr(protocols, "make_plan", plan)
        monkeypatch.setattr("pipelines.stages.teacher.file_identity", weights)
        path = str(ROOT / "configs" / f"{config}.yaml")
        found[config] = list(all_steps(path))
    return found


def all_steps(config: str) -> Iterator[Step]:
    for protocol in PROTOCOLS.values():
        yield from steps(protocol, config, ["teacher.weights=a_file.safetensors"])


def test_each_point_had_the_name_of_the_table_and_has_that_of_its_row(
    study: dict[str, list[Step]],
) -> None:
    names: dict[str, str] = {}
    for config, own in study.items():
        for step in own:
            names |= dict(digests.renamed(step, DATA[config]["earlier_fingerprint"]))
    assert {before: names.get(before) for before in POINTS} == POINTS


def test_every_point_is_a_row_with_its_images() -> None:
    points = [row["point"] for row in ROWS]
    assert len(points) == len(set(points))
    assert set(POINTS.values()) <= set(points)
    files = {path.name.removesuffix(".csv.gz") for path in (ROOT / "results/images").iterdir()}
    requests = {row["point"] for row in read_rows(ROOT / "results/requests.csv")}
    assert files == set(points) | requests


def test_renaming_moves_rows_and_files_and_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.csv.gz").write_bytes(b"of a")
    (tmp_path / "rate_accuracy.csv").write_text("point,top1\na,0.5\nc,0.6\n")
    assert digests.rename(tmp_path, {"a": "b"}) == 1
    assert (tmp_path / "rate_accuracy.csv").read_text() == "point,top1\nb,0.5\nc,0.6\n"
    assert (tmp_path / "images" / "b.csv.gz").read_bytes() == b"of a"
    assert digests.rename(tmp_path, {"a": "b"}) == 0
