"""Where the server asks, a report tells what each request takes and how it is answered."""

from pipelines.report.figures import rd_figure
from pipelines.report.marks import curves, sizes_of
from pipelines.report.report import write_report
from tests.pipelines.report.evaluations import TASKS, arm, evaluation, text_of


class TestAsked:
    """Of a server that asks, the page tells what each request takes and how it is answered."""

    arms = (
        arm("mantis", size=40.0, **{"val/session_bytes": 31.0, "val/task/animals/top1": 0.9})
        | {"rate_weight": 0.001},
        arm("none", size=90.0, **{"val/session_bytes": 81.0}),
        arm("oracle", size=70.0, **{"val/session_bytes": 61.0}) | {"label": "all at once"},
        arm("teacher"),
    )
    arms[0]["metrics"] |= {
        f"val/task/{name}/session_bytes": size for name, size in (("animals", 12.0), ("road", 50.0))
    }

    def test_the_page_has_a_table_by_request(self, tmp_path):
        page = text_of(write_report(evaluation(*self.arms), tmp_path).html)
        rows = page[page.index("By request") : page.index("Examples")]
        found, dash = " ".join(rows.split()), "\N{EN DASH}"  # a mask and a label have no mean
        assert "MANTiS, 0.001" not in found  # labels are those of the arms
        assert f"mantis, 0.001 31.0 {dash} 12.0 90.0 50.0 40.0" in found
        assert f"none 81.0 {dash} 81.0 50.0 81.0 40.0" in found
        assert f"all at once 61.0 {dash} 61.0 50.0 61.0 40.0" in found
        assert f"teacher {dash} {dash} {dash} 50.0 {dash} 40.0" in found
        assert "Bits per task" not in page

    def test_labels_have_a_mean_over_the_requests(self, tmp_path):
        tasks = [dict(TASKS[0]), {**TASKS[0], "name": "food"}]
        arms = [{**each, "metrics": dict(each["metrics"])} for each in self.arms]
        for each in arms:
            each["metrics"]["val/task/food/top1"] = 0.7
        arms[0]["metrics"]["val/task/food/session_bytes"] = 20.0
        page = text_of(write_report(evaluation(*arms, tasks=tasks), tmp_path).html)
        assert "mantis, 0.001 16.0 80.0 12.0 90.0 20.0 70.0" in " ".join(page.split())

    def test_curves_are_over_the_bytes_of_the_request(self):
        assert sizes_of(self.arms, "road") == ("val/task/road/session_bytes", "val/session_bytes")
        drawn = curves(self.arms, "val/task/road/miou", sizes_of(self.arms, "road"))
        assert {kind: points[0].size for kind, points in drawn.items()} == {
            "mantis": 50.0,
            "none": 81.0,
            "oracle": 61.0,
            "teacher": 0.0,
        }
        drawn = curves(self.arms, "val/top1", sizes_of(self.arms))
        assert [drawn[kind][0].size for kind in ("mantis", "none")] == [31.0, 81.0]
        figure = rd_figure(self.arms)
        assert "reply in a session" in figure.axes[0].get_xlabel()
        assert any("all at once" in t.get_text() for t in figure.legends[0].get_texts())

    def test_without_requests_sizes_are_those_of_files(self):
        assert sizes_of([arm("mantis", size=40.0)], "road") == ("val/wire_bytes",)
