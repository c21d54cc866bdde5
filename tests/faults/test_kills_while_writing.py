"""Kill -9 at random moments while checkpoints, stages, shards and records are written."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from tests.faults.harness import PATIENCE_S, Command
from tests.faults.matrix import RUN, Experiment, LocalRay, campaign, complaints, differing
from tests.faults.writing import findings, write_for_ever

LONGEST_S = 0.3  # about a round of all that is written


@pytest.mark.filterwarnings("ignore:The .* method is deprecated:DeprecationWarning")  # Ray's own
@pytest.mark.parametrize(
    "kills", [5, pytest.param(100, marks=[pytest.mark.faults, pytest.mark.timeout(900)])]
)
def test_no_kill_leaves_an_unreadable_latest_or_a_false_done(tmp_path: Path, kills: int) -> None:
    moments = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.writing"])
    done = context.Value("q", 0)
    for number in range(kills):
        begun = done.value
        writer = context.Process(target=write_for_ever, args=(str(tmp_path), done))
        writer.start()
        while done.value == begun:  # so that every writer begins with what the last one left
            assert writer.is_alive()
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, LONGEST_S))
        writer.kill()
        writer.join()
        assert findings(tmp_path, done.value) == [], f"kill {number}"
    assert done.value >= kills


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_a_chain_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    moments = random.Random(0)
    unkilled = Experiment(tmp_path / "unkilled")
    campaign(unkilled, RUN, [], LocalRay())
    experiment = Experiment(tmp_path / "killed", images=unkilled.images)
    for _ in range(5):
        with Command(RUN, experiment.folder) as command:
            if command.end(moments.uniform(10.0, 60.0)) is None:
                command.process.kill()
                assert command.end(PATIENCE_S) is not None
                assert command.resume in ([], list(RUN))  # none: it had not begun yet
    campaign(experiment, RUN, [], LocalRay())
    assert complaints(experiment, []) + differing(experiment, unkilled) == []
