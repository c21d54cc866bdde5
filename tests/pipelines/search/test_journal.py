"""The journal: what is written reads back, a kill at any moment leaves one that reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.search.journal import Journal, TrialRecord, open_journal
from pipelines.search.points import RdPoint
from pipelines.stages.record import StageBusy
from pipelines.storage import Store

FOLDER = "searches/joint-abc"
EPOCH = {"epoch": 1.0, "holdout/bits": 80.0, "holdout/top1": 0.5}


def trial(number: int) -> TrialRecord:
    return TrialRecord(
        number, {"stage2.rate_weight": 0.01, "model.prior": "shared"}, 0.25, {"stage2": "k"}, "run"
    )


def test_a_journal_reads_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal(Store(tmp_path), FOLDER)
    journal.asked(trial(0))
    journal.epoch(0, EPOCH)
    journal.epoch(0, {**EPOCH, "epoch": 2.0, "holdout/top1": 0.6})
    journal.ended(0, "finished", figures={**EPOCH, "holdout/bits": 72.0})
    journal.asked(trial(1))
    again = Journal(Store(tmp_path), FOLDER)
    assert again.trials == journal.trials
    first, second = again.trials.values()
    assert (first.state, sorted(first.epochs), first.weight) == ("finished", [1, 2], 0.25)
    assert first.points == (RdPoint(20.0, 0.5),)
    assert second.state == "running"
    assert second.points == ()
    again.ended(1, "failed", "no luck")
    assert Journal(Store(tmp_path), FOLDER).trials[1].reason == "no luck"


def test_a_trial_that_was_stopped_stands_at_its_last_epoch(tmp_path: Path) -> None:
    journal = Journal(Store(tmp_path), FOLDER)
    journal.asked(trial(0))
    journal.epoch(0, EPOCH)
    journal.ended(0, "stopped", "too dear")
    assert journal.trials[0].points == (RdPoint(21.0, 0.5),)


def test_an_epoch_is_written_once(tmp_path: Path) -> None:
    journal = Journal(Store(tmp_path), FOLDER)
    journal.asked(trial(0))
    journal.epoch(0, EPOCH)
    before = sorted((tmp_path / FOLDER / "journal").iterdir())
    journal.epoch(0, EPOCH)
    assert sorted((tmp_path / FOLDER / "journal").iterdir()) == before


def test_events_are_never_rewritten(tmp_path: Path) -> None:
    journal = Journal(Store(tmp_path), FOLDER)
    journal.asked(trial(0))
    written = next((tmp_path / FOLDER / "journal").iterdir())
    content = written.read_bytes()
    Journal(Store(tmp_path), FOLDER).epoch(0, EPOCH)
    assert written.read_bytes() == content
    assert len(list((tmp_path / FOLDER / "journal").iterdir())) == 2


def test_a_file_a_kill_left_half_written_is_not_read(tmp_path: Path) -> None:
    journal = Journal(Store(tmp_path), FOLDER)
    journal.asked(trial(0))
    (tmp_path / FOLDER / "journal/.00000002.json.x7").write_text('{"event": "ep')
    again = Journal(Store(tmp_path), FOLDER)
    assert list(again.trials) == [0]
    again.epoch(0, EPOCH)
    assert Journal(Store(tmp_path), FOLDER).trials[0].epochs == {1: EPOCH}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        open_journal(Store(tmp_path), FOLDER),
        pytest.raises(StageBusy, match="this search"),
        open_journal(Store(tmp_path), FOLDER),
    ):
        pass
    with open_journal(Store(tmp_path), FOLDER) as journal:
        assert journal.trials == {}


WRITER = """
import sys
from pipelines.search.journal import TrialRecord, open_journal
from pipelines.storage import Store
with open_journal(Store(sys.argv[1]), "searches/joint-abc") as journal:
    start = len(journal.trials)
    for number in range(start, start + 10_000):
        journal.asked(TrialRecord(number, {}, 0.5))
        journal.epoch(number, {"epoch": 1.0})
        journal.ended(number, "finished")
        print(number, flush=True)
"""


def test_kill_9_while_writing_loses_nothing_that_was_told(tmp_path: Path) -> None:
    for round_ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(10)]
            time.sleep(0.003 * round_)
            os.kill(process.pid, signal.SIGKILL)
            told += [int(line) for line in process.stdout.read().split()]
        trials = Journal(Store(tmp_path), FOLDER).trials
        assert all(trials[number].state == "finished" for number in told)
        assert len(trials) <= told[-1] + 2
