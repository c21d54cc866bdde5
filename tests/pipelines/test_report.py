"""A report holds every point, says what is missing, and is one safe page that fetches nothing."""

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from pipelines.report import ReportError, write_report
from pipelines.report_figures import curve

TASKS = [
    {"name": "animals", "kind": "classification", "labels": ["cat", "dog"]},
    {"name": "road", "kind": "segmentation", "labels": ["road", "other"]},
]


def arm(kind, *, name="", rate=None, quality=None, seed=0, top1=0.5, size=None, **metrics):
    measured = {"val/top1": top1, "val/task/animals/top1": top1, "val/task/road/miou": 0.4}
    if size is not None:
        measured |= {"val/wire_bytes": size, "val/payload_bytes": size - 10}
        measured |= {"val/estimated_bytes": size - 11, "val/bpp": size * 8 / 1024}
    return {
        "name": name or kind,
        "label": name or kind,
        "kind": kind,
        "rate_weight": rate,
        "quality": quality,
        "seed": seed,
        "stage_key": "abc",
        "metrics": {**measured, **metrics},
        "detector_confusion": [[8, 2], [0, 0]] if kind == "mantis" else None,
        "detection_curve": [(1.0, 0.6), (2.5, 0.9)] if kind in ("mantis", "teacher") else None,
    }


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation(*arms, **fields):
    example = {
        "arm": "stage2",
        "jpeg_base64": jpeg(),
        "wire_bytes": 77,
        "true": {"animals": "cat", "road": "road"},
        "answer": {"animals": "dog"},
        "class": None,
    }
    return {
        "split": "val",
        "rows": 400,
        "image_size": [32, 32],
        "tasks": TASKS,
        "single_class": True,
        "arms": list(arms) or [arm("mantis", rate=0.01, size=64.0)],
        "examples": [example],
        **fields,
    }


def text_of(path) -> str:
    """What a reader sees: the text without tags and style."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skipping = False

        def handle_starttag(self, tag, attributes):
            self.skipping = tag == "style"

        def handle_data(self, data):
            if not self.skipping:
                parts.append(data)

    Reader().feed(path.read_text())
    return " ".join(" ".join(parts).split())


def test_the_tables_hold_every_arm_and_every_metric(tmp_path):
    arms = [arm("mantis", rate=0.01, size=64.0, top1=0.7), arm("teacher", top1=0.8)]
    paths = write_report(evaluation(*arms), tmp_path)
    with paths.csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["mantis", "teacher"]
    assert float(rows[0]["val/wire_bytes"]) == 64.0
    assert rows[1]["val/wire_bytes"] == ""
    points = json.loads(paths.json.read_text())["points"]
    assert [point["metrics"]["val/top1"] for point in points] == [0.7, 0.8]
    with Image.open(paths.png) as image:
        assert image.width > 600


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    page = write_report(evaluation(), tmp_path).html.read_text()
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s]+)', page)
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_names_from_the_data_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script> $x$"
    tasks = [{"name": evil, "kind": "classification", "labels": ["a"]}]
    metrics = {f"val/task/{evil}/top1": 0.5}
    main = {**arm("mantis", rate=0.01, size=64.0, **metrics), "label": evil}
    main["detector_confusion"] = [[1]]
    page = write_report(evaluation(main, tasks=tasks), tmp_path, title=evil).html.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_main_figures_come_with_what_they_are_worth(tmp_path):
    arms = [arm("mantis", rate=0.01, size=64.0, top1=0.7), arm("teacher", top1=0.8)]
    seen = text_of(write_report(evaluation(*arms), tmp_path).html)
    assert "70.0 % top-1, end to end (95 % interval 65.3 to 74.3)" in seen
    assert "64 bytes" in seen
    assert "48 x smaller than the raw pixels" in seen
    assert "\N{MINUS SIGN}10.0 points against the uncompressed teacher" in seen
    assert "One seed." in seen
    assert "this is a point, not a curve" in seen


def test_what_was_not_measured_is_named(tmp_path):
    seen = text_of(write_report(evaluation(), tmp_path).html)
    missing = (
        "no conditioning, oracle tasks, individual models, teacher, no conditioning, task prior"
    )
    assert f"Not measured here: {missing}, " in seen


def test_images_of_several_labels_get_no_interval_and_another_reading(tmp_path):
    seen = text_of(write_report(evaluation(single_class=False), tmp_path).html)
    assert "interval 4" not in seen
    assert "share of (image, true task) pairs" in seen


def test_an_example_says_what_was_wrong_and_what_was_not_sent(tmp_path):
    seen = text_of(write_report(evaluation(), tmp_path).html)
    assert "animals: dog (is cat)" in seen
    assert "road: not sent (is road)" in seen
    assert "77 bytes" in seen


def test_the_confusion_is_in_per_cent_of_the_row_and_survives_an_empty_one(tmp_path):
    seen = text_of(write_report(evaluation(), tmp_path).html)
    assert "animals 80 20 10" in seen
    assert "road 0 0 0" in seen


def test_figures_that_are_not_numbers_are_absent_not_zero(tmp_path):
    main = arm("mantis", rate=0.01, size=64.0)
    broken = arm("oracle", rate=0.01, size=math.inf, top1=math.nan)
    paths = write_report(evaluation(main, broken), tmp_path)
    oracle = json.loads(paths.json.read_text())["points"][1]
    assert "val/top1" not in oracle["metrics"]
    assert "inf" not in paths.csv.read_text()


def test_a_curve_is_the_mean_over_seeds_at_each_rate_by_rising_size():
    arms = [
        arm("mantis", rate=0.001, size=200.0, top1=0.75),
        arm("mantis", rate=0.01, seed=0, size=90.0, top1=0.5),
        arm("mantis", rate=0.01, seed=1, size=110.0, top1=0.7),
        arm("none", rate=0.01, size=100.0, top1=0.1),
    ]
    points = curve(arms, "mantis", "val/top1")
    assert [(point.size, round(point.value, 6)) for point in points] == [(100, 60), (200, 75)]
    assert len(points[0].values) == 2


def test_an_evaluation_without_a_main_arm_is_refused(tmp_path):
    with pytest.raises(ReportError, match="stage2"):
        write_report(evaluation(arm("teacher")), tmp_path)


def test_the_same_evaluation_gives_the_same_files(tmp_path):
    first = write_report(evaluation(), tmp_path / "a")
    second = write_report(evaluation(), tmp_path / "b")
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert one.read_bytes() == other.read_bytes()
