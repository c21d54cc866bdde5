"""A report holds every point, says what is missing, and is one safe page that fetches nothing."""

import csv
import itertools
import json
import math
import re

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from pipelines.report.figures import detection_figure, rd_figure, styled, task_figure
from pipelines.report.marks import curves
from pipelines.report.report import ReportError, write_report
from pipelines.settings.arms import ARM_KINDS
from tests.pipelines.report.evaluations import TASKS, arm, evaluation, text_of

LABELS = {name: kind.label for name, kind in ARM_KINDS.items()}
LOOKS = {name: kind.look for name, kind in ARM_KINDS.items()}


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
    assert "48 \N{MULTIPLICATION SIGN} smaller than the raw pixels" in seen
    assert "\N{MINUS SIGN}10.0 points against the uncompressed teacher" in seen
    assert "One seed." in seen
    assert "MANTiS is a point, not a curve" in seen


def test_what_was_not_measured_is_named(tmp_path):
    seen = text_of(write_report(evaluation(), tmp_path).html)
    missing = [label for kind, label in LABELS.items() if kind != "mantis"]
    assert f"Not measured here: {'; '.join(missing)}." in seen


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
    points = curves(arms, "val/top1")["mantis"]
    assert [(point.size, round(point.value, 6)) for point in points] == [(100, 60), (200, 75)]
    assert len(points[0].seeds) == 2


def test_an_evaluation_without_a_main_arm_is_refused(tmp_path):
    with pytest.raises(ReportError, match="mantis evaluate"):
        write_report(evaluation(arm("teacher")), tmp_path)


def test_the_same_evaluation_gives_the_same_files(tmp_path):
    first = write_report(evaluation(), tmp_path / "a")
    second = write_report(evaluation(), tmp_path / "b")
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert one.read_bytes() == other.read_bytes()


def crowded() -> list[dict]:
    """All kinds at once over two decades of bytes, as in a study."""
    arms = []
    for place, (kind, look) in enumerate(LOOKS.items()):
        if not look.marker:
            arms.append(arm(kind, top1=0.7 + place / 500))
            continue
        for step in range(4):
            size = 30.0 * 2**step * (6 if "then" in LABELS[kind] else 1) + place
            arms.append(arm(kind, rate=0.001 * step, size=size, top1=0.3 + 0.12 * step))
    arms[0]["metrics"] |= {"val/detection/coverage": 0.9, "val/detection/active_tasks": 1.5}
    return arms


MANY_TASKS = [*TASKS * 4, TASKS[0], {**TASKS[0], "name": "a_name_too_long_for_one_of_the_panels"}]
FIGURES = {
    "rd": rd_figure,
    "task": lambda arms: task_figure(arms, MANY_TASKS),
    "one row": lambda arms: task_figure(arms, TASKS),
    "detection": detection_figure,
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_no_text_of_a_figure_is_cut_or_lies_on_another(draw):
    with styled():
        figure = draw(crowded())
        figure.draw_without_rendering()
        beyond = set()  # matplotlib keeps ticks beyond the limits without drawing them
        for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
            low, high = axis.get_view_interval()
            beyond |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t not in beyond]
    for text, box in boxes:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), text
        assert figure.bbox.padded(1).contains(box.x1, box.y1), text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 2, f"{one!r} and {other!r}"


def test_every_kind_of_arm_has_a_look():
    looks = [(look.colour, look.marker, look.hollow, look.dash) for look in LOOKS.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("draw", [FIGURES["rd"], FIGURES["task"]], ids=["rd", "task"])
def test_the_key_names_each_drawn_arm_and_stands_outside_the_axes(draw):
    arms = [each for each in crowded() if each["kind"] not in ("avif", "individual")]
    with styled():
        figure = draw(arms)
        figure.draw_without_rendering()
    key = figure.legends[0]
    named = [text.get_text().partition(":")[0] for text in key.get_texts()]
    assert sorted(named) == sorted({each["label"] for each in arms})
    assert not any(key.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


@pytest.mark.parametrize("largest", [80.0, 640.0, 20_000.0])
def test_small_panels_have_two_sizes_to_read(largest):
    arms = [arm("mantis", rate=size, size=size) for size in (30.0, largest)]
    with styled():
        axes = task_figure(arms, MANY_TASKS).axes[0]
        low, high = axes.get_xlim()
        assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) >= 2


def test_a_model_without_bytes_is_a_line_across():
    arms = [arm("mantis", rate=0.01, size=64.0, top1=0.5), arm("teacher", top1=0.8)]
    heights = [set(line.get_ydata()) for line in rd_figure(arms).axes[0].lines]
    assert {80.0} in heights


def test_each_figure_occurs_once_scales_and_has_a_name(tmp_path):
    page = write_report(evaluation(*crowded()), tmp_path).html.read_text()
    axis_labels = ("top-1 accuracy (%)", "top-1 accuracy or mean IoU (%)", "coverage: true tasks")
    assert [page.count(f">{label}") for label in axis_labels] == [1, 1, 1]
    figures = re.findall(
        r'<div class="card figure" role="img" aria-label="[^"]+"><svg ([^>]*)>', page
    )
    assert len(figures) == page.count("<svg") == 3
    assert all("viewBox=" in attributes for attributes in figures)
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)


def test_every_kind_is_styled_in_both_colour_schemes(tmp_path):
    page = write_report(evaluation(*crowded()), tmp_path).html.read_text()
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for kind, look in LOOKS.items():
        assert f".kind-{kind} {{ color: {look.colour}; }}" in light
        assert f".kind-{kind} {{ color: {look.dark}; }}" in dark
        assert re.search(rf'<g class="mark kind-{kind}( hollow)?">', page)


def test_a_detector_that_never_sends_a_second_task_has_a_figure_too(tmp_path):
    main = {**arm("mantis", rate=0.01, size=64.0), "detection_curve": [(1.0, 1.0), (1.0, 1.0)]}
    assert "Coverage against active tasks" in text_of(write_report(evaluation(main), tmp_path).html)


@pytest.mark.parametrize("kind", LOOKS)
def test_a_kind_stands_out_on_white_and_on_the_dark_card(kind):
    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert 1.05 / (luminance(LOOKS[kind].colour) + 0.05) >= 3
    assert (luminance(LOOKS[kind].dark) + 0.05) / (luminance("#1c2227") + 0.05) >= 3


def test_bits_and_bytes_of_each_task_are_told(tmp_path):
    main = arm("mantis", rate=0.01, size=64.0, **{"val/task/animals/wire_bytes": 80.0})
    page = write_report(evaluation(main), tmp_path).html
    assert "task bits wire bytes animals 640 80.0" in text_of(page)
    assert "--share: 1.000" in page.read_text()


def test_an_image_keeps_its_shape_and_every_table_scrolls_in_its_own_box(tmp_path):
    page = write_report(evaluation(image_size=[32, 64]), tmp_path).html.read_text()
    assert "aspect-ratio: 64 / 32;" in page
    assert "object-fit" not in page
    boxed = re.findall(r'<div class="scroll [a-z]+" role="region" [^>]*><table', page)
    assert len(boxed) == page.count("<table") >= 3


def test_an_example_has_the_joint_answer_and_calls_a_mask_no_answer(tmp_path):
    said = {"animals": "cat", "road": "mask"}
    example = {**evaluation()["examples"][0], "true": said, "answer": said, "class": "tabby"}
    seen = text_of(write_report(evaluation(examples=[example]), tmp_path).html)
    assert "road: mask decoded" in seen
    assert "joint answer: tabby" in seen


def test_rows_stand_by_kind_and_size_and_the_main_one_is_marked(tmp_path):
    arms = [
        arm("mantis", rate=0.01, size=64.0),
        arm("mantis", name="small", rate=0.1, size=32.0),
        arm("teacher", name="whole"),
        arm("none", name="plain", rate=0.01, size=66.0),
    ]
    page = write_report(evaluation(*arms), tmp_path).html.read_text()
    rows = re.findall(r'<tr( class="main")?><th scope="row"><span class="dot.*?</span>(\w+)', page)
    marked = ' class="main"'
    assert rows == [("", "small"), (marked, "mantis"), ("", "whole"), ("", "plain")]


def test_one_task_has_a_whole_report_without_figures_of_detection(tmp_path):
    main = arm("mantis", rate=0.01, size=64.0, top1=0.7)
    main |= {"detector_confusion": [[400]], "detection_curve": [(1.0, 1.0)] * 3}
    seen = text_of(write_report(evaluation(main, tasks=TASKS[:1]), tmp_path).html)
    assert "1 task, 400 images" in seen
    assert "70.0 % top-1, end to end" in seen
    assert "Confusion matrix" not in seen
    assert "Coverage against active tasks" not in seen


def test_a_segmentation_alone_is_reported_by_its_mean_iou(tmp_path):
    def segmenting(kind, miou, **fields):
        own = {**arm(kind, **fields), "detector_confusion": None}
        kept = {k: v for k, v in own["metrics"].items() if "top1" not in k}
        return {**own, "metrics": {**kept, "val/miou": miou, "val/task/road/miou": miou}}

    arms = [segmenting("mantis", 0.41, rate=0.01, size=64.0), segmenting("teacher", 0.5)]
    made = evaluation(*arms, tasks=TASKS[1:], single_class=False)
    paths = write_report(made, tmp_path)
    seen = text_of(paths.html)
    assert "41.0 % mean IoU, end to end" in seen
    assert "\N{MINUS SIGN}9.0 points against the uncompressed teacher" in seen
    assert "Mean IoU is end to end" in seen
    assert "top-1" not in seen.lower()
    with styled():
        figure = rd_figure(arms)
    assert figure.axes[0].get_ylabel() == "mean IoU (%)"
    assert paths.png.stat().st_size > 0


def test_an_evaluation_without_any_accuracy_still_has_a_report(tmp_path):
    main = arm("mantis", rate=0.01, size=64.0)
    main["metrics"] = {k: v for k, v in main["metrics"].items() if "bytes" in k}
    seen = text_of(write_report(evaluation(main), tmp_path).html)
    assert "64 bytes" in seen


def test_agreement_with_the_teacher_is_a_column_where_it_was_measured(tmp_path):
    main, teacher = arm("mantis", rate=0.01, size=64.0), arm("teacher", top1=0.8)
    before = text_of(write_report(evaluation(main, teacher), tmp_path).html)
    assert "as the teacher" not in before.lower()
    main["metrics"]["val/agreement"] = 0.625
    seen = text_of(write_report(evaluation(main, teacher), tmp_path).html)
    assert "as the teacher %" in seen
    assert "62.5" in seen
    assert "As the teacher: the share of images" in seen
