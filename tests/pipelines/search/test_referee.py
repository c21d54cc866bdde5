"""The referee: who goes on at a rung, what a resumed search remembers, what a lost one costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.search.journal import TrialRecord
from pipelines.search.points import Halving, SearchObjective
from pipelines.search.referee import EpochListener, Referee
from pipelines.stages.spec import TrainingStopped
from pipelines.tracking.metric_writer import MetricWriter
from pipelines.training.callback import StageCallback, listening
from tests.pipelines.search_bench import REFERENCE


def of(objective: str) -> SearchObjective:
    return SearchObjective(objective, REFERENCE)


def epoch(number: int, top1: float, bits: float = 80.0) -> dict[str, float]:
    return {"epoch": float(number), "holdout/bits": bits, "holdout/top1": top1}


def test_the_worst_of_three_is_stopped_at_a_rung_and_nowhere_else() -> None:
    referee = Referee(Halving(9, 1, 3), of("top1"))
    assert referee.judge(0, 0.5, epoch(1, 0.5)).goes_on
    assert referee.judge(1, 0.5, epoch(1, 0.6)).goes_on
    verdict = referee.judge(2, 0.5, epoch(1, 0.4))
    assert (verdict.goes_on, verdict.broken) == (False, False)
    assert verdict.reason == "not among the best 1/3 of 3 trials after epoch 1"
    assert referee.judge(0, 0.5, epoch(2, 0.1)).goes_on
    assert [each.trial for each in referee.drain()] == [0, 1, 2, 0]
    assert referee.drain() == []


def test_an_epoch_that_is_told_twice_counts_once() -> None:
    referee = Referee(Halving(9, 1, 3), of("top1"))
    for _ in range(3):
        assert referee.judge(0, 0.5, epoch(1, 0.4)).goes_on


def test_a_resumed_search_judges_by_what_the_journal_knows() -> None:
    referee = Referee(Halving(9, 1, 3), of("top1"))
    referee.recall(
        [
            TrialRecord(number, {}, 0.5, epochs={1: epoch(1, 0.5 + number / 10)}, state="finished")
            for number in range(4)
        ]
    )
    assert not referee.judge(9, 0.5, epoch(1, 0.4)).goes_on
    assert referee.judge(10, 0.5, epoch(1, 0.9)).goes_on


def test_an_epoch_without_a_number_is_broken() -> None:
    verdict = Referee(None, of("pareto")).judge(3, 0.5, {"epoch": 2.0, "holdout/top1": 0.5})
    assert (verdict.goes_on, verdict.broken) == (False, True)
    assert verdict.reason == "holdout/bits or holdout/top1 of epoch 2 is not a finite number"


def test_without_halving_nobody_is_stopped() -> None:
    referee = Referee(None, of("top1"))
    assert all(referee.judge(n, 0.5, epoch(1, 1 - n / 10)).goes_on for n in range(9))


class Listener:
    def __init__(self) -> None:
        self.heard: list[float] = []

    def __call__(self, figures: Any) -> None:
        self.heard.append(figures["epoch"])
        if figures["holdout/top1"] < 0.2:
            raise TrainingStopped("too bad")


def callback(tmp_path: Path, listener: Listener | None) -> StageCallback:
    writer = MetricWriter("sqlite://", None, tmp_path / "spool.jsonl")
    if listener is None:
        return StageCallback(writer, 2)
    with listening(listener):
        return StageCallback(writer, 2)


def report(*epochs: dict[str, float]) -> list[dict[str, Any]]:
    return [{**epochs[-1], "history": json.dumps(epochs)}]


def test_a_training_tells_its_listener_each_epoch_once_and_may_be_ended(tmp_path: Path) -> None:
    listener = Listener()
    told = callback(tmp_path, listener)
    told.after_report(None, report(epoch(1, 0.5), epoch(2, 0.6)), None)
    told.after_report(None, report(epoch(1, 0.5), epoch(2, 0.6), epoch(3, 0.7)), None)
    assert listener.heard == [1, 2, 3]
    with pytest.raises(TrainingStopped):
        told.after_report(None, report(epoch(3, 0.7), epoch(4, 0.1)), None)
    spooled = [json.loads(line) for line in (tmp_path / "spool.jsonl").read_text().splitlines()]
    assert [each["step"] for each in spooled] == [1, 2, 3, 4]


def test_trainings_outside_the_block_have_no_listener(tmp_path: Path) -> None:
    listener = Listener()
    callback(tmp_path, listener)
    callback(tmp_path, None).after_report(None, report(epoch(1, 0.1)), None)
    assert listener.heard == []


def test_a_lost_referee_stops_nobody(ray_session: Any) -> None:
    EpochListener("mantis-referee-nobody", 0, 0.5)(epoch(1, 0.0))


def test_a_listener_raises_what_the_referee_says(ray_session: Any) -> None:
    name = "mantis-referee-of-this-test"
    referee = (
        ray_session.remote(num_cpus=0)(Referee)
        .options(name=name)
        .remote(Halving(9, 1, 3), of("top1"))
    )
    for trial, top1 in enumerate((0.5, 0.6)):
        EpochListener(name, trial, 0.5)({**epoch(1, top1), "note": "text is left out"})
    with pytest.raises(TrainingStopped, match="not among the best 1/3"):
        EpochListener(name, 2, 0.5)(epoch(1, 0.4))
    with pytest.raises(ArithmeticError, match="not a finite number"):
        EpochListener(name, 3, 0.5)({"epoch": 1.0})
    assert len(ray_session.get(referee.drain.remote())) == 4
    ray_session.kill(referee)
