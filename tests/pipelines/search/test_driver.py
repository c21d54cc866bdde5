"""The driver without Ray: what is asked, what is refused, what is equal, what a resume finds."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.chain.plan import Plan
from pipelines.cluster.preflight import PreflightError
from pipelines.search.driver import SearchDriver, Timing
from pipelines.search.journal import Journal, finished_points
from pipelines.search.points import SearchObjective, pareto_front
from pipelines.search.referee import Verdict
from pipelines.search.result import SearchOptions
from pipelines.search.view import SearchView
from pipelines.storage import Store
from tests.pipelines.fakes import same_code
from tests.pipelines.search_bench import (
    REFERENCE,
    joint,
    learned,
    outcome,
    small_settings,
    small_task,
)
from tune_spaces.domains import Choice, Field, Space


class FakeRuns:
    """Remembers what MLflow would be told."""

    def __init__(self) -> None:
        self.closed: list[tuple[int, str]] = []
        self.steps: list[int] = []

    def open_trial(self, number: int, params: object, weight: float) -> str:
        return f"run {number}"

    def close_trial(self, record: Any) -> None:
        self.closed.append((record.number, record.state))

    def progress(self, step: int, figures: object) -> None:
        self.steps.append(step)


class Bench:
    """Drivers over one journal, one after the other, as if each had been killed."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.task = small_task(small_settings(folder, **sections))
        self.store = Store(self.task.settings.storage.root)
        self.space: Space = joint()
        self.check: Callable[[Plan], None] = lambda plan: None
        self.runs = FakeRuns()
        self.text = io.StringIO()

    def driver(self, trials: int = 4, **options: Any) -> SearchDriver:
        view = SearchView(self.text)
        journal = Journal(self.store, "searches/test")
        made = SearchDriver(
            SearchOptions("joint", trials, **options),
            self.space,
            self.task,
            journal,
            self.runs,  # type: ignore[arg-type]
            view,
            objective=SearchObjective(options.get("objective", "pareto"), REFERENCE),
            check=self.check,
        )
        view.start(journal.trials, total=trials, concurrent=1, epochs=9)
        return made


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    same_code(monkeypatch)
    return Bench(tmp_path)


def test_as_many_trials_as_asked_for_are_begun_and_written_down(bench: Bench) -> None:
    driver = bench.driver(trials=3)
    seen = []
    while (trial := driver.next_trial()) is not None:
        seen.append(trial)
        driver.over(trial["number"], outcome(trial["params"]))
    assert [trial["number"] for trial in seen] == [0, 1, 2]
    assert [trial["run_id"] for trial in seen] == ["run 0", "run 1", "run 2"]
    assert all(0 <= trial["weight"] <= 1 for trial in seen)
    known = Journal(bench.store, "searches/test").trials
    assert [record.state for record in known.values()] == ["finished"] * 3
    assert all(len(record.epochs) == 9 for record in known.values())
    assert all(set(r.keys) == {"prepare", "teacher", "stage1", "stage2"} for r in known.values())
    assert bench.runs.closed == [(0, "finished"), (1, "finished"), (2, "finished")]
    assert bench.runs.steps == [1, 2, 3]


def test_a_killed_search_goes_on_with_what_was_running_and_asks_no_trial_again(
    bench: Bench,
) -> None:
    first = bench.driver(trials=4)
    done, running = first.next_trial(), first.next_trial()
    assert done is not None
    assert running is not None
    first.over(done["number"], outcome(done["params"]))
    first.judged(Verdict(1, learned(running["params"], 1)))
    second = bench.driver(trials=4)
    again = second.next_trial()
    assert again == running
    for epoch in (1, 2):  # a resumed training reports all its epochs with the next one
        second.judged(Verdict(1, learned(running["params"], epoch)))
    told = bench.text.getvalue().splitlines()
    assert len([line for line in told if line.startswith("trial 1: epoch 1/")]) == 1
    assert len([line for line in told if line.startswith("trial 1: epoch 2/")]) == 1
    second.over(1, outcome(running["params"]))
    rest = [second.next_trial(), second.next_trial()]
    assert [trial["number"] for trial in rest if trial] == [2, 3]
    assert second.next_trial() is None
    assert second.journal.trials[0].params == done["params"]


def test_a_resumed_search_proposes_what_the_uninterrupted_one_would_have(
    bench: Bench, tmp_path: Path
) -> None:
    whole, parts = [], []
    driver = bench.driver(trials=8)
    while (trial := driver.next_trial()) is not None:
        whole.append(trial["params"])
        driver.over(trial["number"], outcome(trial["params"]))
    other = Bench(tmp_path / "runs")
    for _ in range(8):
        driver = other.driver(trials=8)
        trial = driver.next_trial()
        assert trial is not None
        parts.append(trial["params"])
        driver.over(trial["number"], outcome(trial["params"]))
    assert parts == whole


def test_more_trials_extend_a_search(bench: Bench) -> None:
    for trials in (2, 3):
        driver = bench.driver(trials=trials)
        while (trial := driver.next_trial()) is not None:
            driver.over(trial["number"], outcome(trial["params"]))
    assert bench.runs.closed == [(0, "finished"), (1, "finished"), (2, "finished")]


def test_two_equal_trials_are_never_trained_twice(bench: Bench) -> None:
    bench.space = {"model.prior": Field(Choice(("primary", "shared")))}
    driver = bench.driver(trials=4)
    begun = []
    while (trial := driver.next_trial()) is not None:
        begun.append(trial["params"]["model.prior"])
        driver.over(trial["number"], outcome({**trial["params"], "stage2.rate_weight": 0.001}))
    assert sorted(begun) == ["primary", "shared"]
    states = {r.number: (r.state, r.reason) for r in driver.journal.trials.values()}
    assert states[2][0] == states[3][0] == "equal"
    assert states[2][1] in ("equal to trial 0", "equal to trial 1")


def test_a_sample_the_config_refuses_is_a_failed_trial_and_the_search_goes_on(
    bench: Bench,
) -> None:
    bench.space = {"stage2.rate_weight": Field(Choice((-1.0, 0.01)))}
    driver = bench.driver(trials=6, kind="random")
    begun = 0
    while (trial := driver.next_trial()) is not None:
        begun += 1
        driver.over(trial["number"], outcome({**trial["params"], "model.prior": "primary"}))
    failed = [r for r in driver.journal.trials.values() if r.state == "failed"]
    assert begun == 1
    assert failed
    assert "stage2.rate_weight: got -1.0" in failed[0].reason


def test_a_trial_that_asks_for_more_than_the_cluster_has_is_not_begun(bench: Bench) -> None:
    def check(plan: Plan) -> None:
        if plan.settings.cluster.workers > 4:
            raise PreflightError("asks for 64 CPUs, and this machine has 2")

    bench.space = {"cluster.workers": Field(Choice((1, 64))), **joint()}
    bench.check = check
    driver = bench.driver(trials=6, kind="random")
    while (trial := driver.next_trial()) is not None:
        assert trial["params"]["cluster.workers"] == 1
        driver.over(trial["number"], outcome(trial["params"]))
    failed = [r for r in driver.journal.trials.values() if r.state == "failed"]
    assert failed
    assert {r.reason for r in failed} == {"asks for 64 CPUs, and this machine has 2"}
    assert {r.params["cluster.workers"] for r in failed} == {64}


def test_a_trial_whose_process_is_lost_is_failed_with_its_reason(bench: Bench) -> None:
    driver = bench.driver(trials=1)
    assert driver.next_trial() is not None
    driver.over(0, None)
    record = driver.journal.trials[0]
    assert (record.state, record.reason) == (
        "failed",
        "the trial's process died 3 times (tune.max_failures)",
    )


def test_only_finished_trials_make_the_front(bench: Bench) -> None:
    driver = bench.driver(trials=3)
    for state in ("finished", "stopped", "failed"):
        trial = driver.next_trial()
        assert trial is not None
        driver.over(trial["number"], outcome(trial["params"], epochs=3, state=state))
    points = finished_points(driver.journal.trials)
    assert pareto_front(points) == [(0, 0)]


def test_the_view_tells_each_trial_in_plain_lines(bench: Bench) -> None:
    driver = bench.driver(trials=2)
    first, second = driver.next_trial(), driver.next_trial()
    assert first is not None
    assert second is not None
    driver.judged(Verdict(0, learned(first["params"], 1)))
    driver.over(0, outcome(first["params"]))
    driver.over(1, replace(outcome(second["params"], 1, "stopped"), reason="not good enough"))
    lines = bench.text.getvalue().splitlines()
    assert lines[0] == "search: 2 trials, 1 at a time"
    assert lines[1].startswith("trial 0: started, model.encoder.latent_channels=")
    assert lines[3].startswith("trial 0: epoch 1/9, top1 ")
    assert lines[4].startswith("trial 0: finished, top1 ")
    assert ", on the front (1/2, " in lines[4]
    assert lines[5].startswith("trial 1: stopped, not good enough, top1 ")
    assert lines[5].endswith("(2/2)")


def test_the_live_table_shows_states_front_and_time_left(bench: Bench) -> None:
    stream = io.StringIO()
    driver = bench.driver(trials=3)
    driver.view = SearchView(stream, live=True)
    with driver.view as view:
        view.start({}, total=3, concurrent=1, epochs=9)
        first, second = driver.next_trial(), driver.next_trial()
        assert first is not None
        assert second is not None
        driver.over(0, outcome(first["params"]))
    text = stream.getvalue()
    for told in ("1 running", "1 finished", "1 to come", "left", "best top1", "◆", "▸"):
        assert told in text


def test_idle_time_is_that_in_which_no_trial_ran() -> None:
    timing = Timing()
    for process, began, finished in ((1.0, 2.0, 5.0), (1.0, 6.0, 8.0), (4.0, 4.5, 7.0)):
        timing.add(replace(outcome(LIKE), process=process, began=began, finished=finished))
    assert timing.idle(0.0, 10.0) == pytest.approx(1.0 + 2.0)


LIKE = {"stage2.rate_weight": 0.01, "model.prior": "primary"}
