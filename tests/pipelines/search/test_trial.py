"""A trial's end, whatever it is, as an outcome with its reason; who may train a stage 1."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.search import trial as search_trial
from pipelines.search.trial import SearchTask, TrialOutcome, one_at_a_time, patiently, train_trial
from pipelines.stages.record import StageBusy
from pipelines.stages.spec import StageFailed, TrainingStopped
from tests.pipelines.fakes import same_code
from tests.pipelines.search_bench import learned, small_settings, small_task

PARAMS = {"stage2.rate_weight": 0.01, "model.prior": "shared"}
EPOCHS = [learned(PARAMS, epoch) for epoch in (1, 2)]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchTask:
    same_code(monkeypatch)
    return small_task(small_settings(tmp_path))


def run(
    task: SearchTask, monkeypatch: pytest.MonkeyPatch, training: Any, params: Any = None
) -> TrialOutcome:
    """A trial whose training returns or raises what is given."""

    def train(*arguments: Any, **options: Any) -> Any:
        if isinstance(training, BaseException):
            raise training
        return training

    monkeypatch.setattr(search_trial, "_train", train)
    config = {"number": 0, "params": params or PARAMS, "weight": 0.5, "run_id": None}
    return train_trial(config, task, 1)


def test_a_finished_trial_brings_its_figures_and_epochs(
    task: SearchTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(task, monkeypatch, (EPOCHS[1], EPOCHS))
    assert (outcome.state, outcome.reason) == ("finished", "")
    assert list(outcome.epochs) == EPOCHS
    assert outcome.process <= outcome.began <= outcome.finished
    again = TrialOutcome.from_json(outcome.to_json())
    assert (again.state, list(again.epochs), again.figures) == ("finished", EPOCHS, EPOCHS[1])


@pytest.mark.parametrize(
    ("ending", "state", "reason"),
    [
        (TrainingStopped("not good enough"), "stopped", "not good enough"),
        (
            StageFailed("stage2", RuntimeError("the loss is nan at step 3\nand more")),
            "failed",
            "stage2 failed: RuntimeError: the loss is nan at step 3",
        ),
        (OSError("no space left"), "failed", "OSError: no space left"),
        (
            ({"epoch": 2.0, "holdout/top1": 0.5}, [{"epoch": 2.0}]),
            "failed",
            "holdout/bits or holdout/top1 of epoch 2 is not a finite number",
        ),
    ],
)
def test_every_other_end_has_its_reason(
    task: SearchTask, monkeypatch: pytest.MonkeyPatch, ending: Any, state: str, reason: str
) -> None:
    outcome = run(task, monkeypatch, ending)
    assert (outcome.state, outcome.reason) == (state, reason)


def test_a_sample_that_is_no_config_fails(
    task: SearchTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(task, monkeypatch, None, params={"stage2.rate_weight": -1.0})
    assert outcome.state == "failed"
    assert "stage2.rate_weight: got -1.0" in outcome.reason


def test_a_busy_stage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_trial, "WAIT_S", 0.01)
    left = [StageBusy("wait"), StageBusy("wait")]

    def stage() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(stage) == "done"
    assert left == []


def test_one_trial_at_a_time_passes_with_one_key(
    ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_trial, "WAIT_S", 0.05)
    passed = threading.Event()

    def second() -> None:
        with one_at_a_time("a key of this test"):
            passed.set()

    with one_at_a_time("a key of this test"):
        thread = threading.Thread(target=second)
        thread.start()
        with one_at_a_time("another key"):
            assert not passed.wait(0.5)
    assert passed.wait(30)
    thread.join()
