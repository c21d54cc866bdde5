"""Workers that are killed again and again: finished epochs decide whether a training goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.faults.harness import PATIENCE_S, Command, kill, titled
from tests.faults.matrix import TITLES
from tests.pipelines.experiment import paint, write_config

KILLS = 5
RESTARTS = 2
EPOCHS_BETWEEN = 2  # an epoch is printed a moment before its checkpoint is whole


def experiment(folder: Path) -> list[str]:
    """Writes a config that allows two restarts in a row, fewer than there are kills.

    Returns the command that trains stage 1.
    """
    paint(folder / "images", train=60)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["cluster"]["max_failures"] = RESTARTS
    config["stage1"] = {"epochs": KILLS * EPOCHS_BETWEEN + 2, "batch_size": 16}
    path.write_text(yaml.safe_dump(config))
    return ["stage1", "--config", str(path)]


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_goes_on_as_long_as_it_finishes_epochs(tmp_path: Path) -> None:
    with Command(experiment(tmp_path), tmp_path) as command:
        for number in range(1, KILLS + 1):
            epoch = number * EPOCHS_BETWEEN
            assert command.line(f"stage1: epoch {epoch}/") is not None, command.output[-3000:]
            kill(
                lambda: next(titled([command.process.pid], TITLES["train worker"]), None),
                TITLES["train worker"],
            )
        assert command.end(PATIENCE_S) is not None, command.output[-3000:]
    assert command.process.returncode == 0, command.output[-3000:]


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_without_progress_ends_and_says_why(tmp_path: Path) -> None:
    """Workers that Ray is still starting count by a limit of Ray, those that train by ours."""
    with Command(experiment(tmp_path), tmp_path) as command:
        assert command.line("stage1: epoch 2/") is not None, command.output[-3000:]
        while command.end(0.05) is None:
            for process in list(titled([command.process.pid], TITLES["train worker"])):
                process.kill()
        output = command.output
    assert command.process.returncode == 1, output[-3000:]
    reason = r"[23] times without a finished epoch|WorkerGroupStartupFailedError: .* failed to"
    assert re.search(reason, output), output[-3000:]
    assert "Traceback" not in output
    assert command.resume
