"""Workers that are killed again and again: finished epochs decide whether a training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.faults.harness import PATIENCE_S, Command, kill, titled
from tests.pipelines.experiment import paint, write_config

WORKER = "ray::RayTrainWorker"
KILLS = 5


def experiment(folder: Path) -> list[str]:
    """Writes a config that allows one restart in a row. Returns the command that trains stage 1."""
    paint(folder / "images", train=60)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["cluster"]["max_failures"] = 1
    config["stage1"] = {"epochs": KILLS + 2, "batch_size": 16}
    path.write_text(yaml.safe_dump(config))
    return ["stage1", "--config", str(path)]


def kill_worker(command: Command) -> None:
    kill(lambda: next(titled([command.process.pid], WORKER), None), WORKER)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_goes_on_as_long_as_it_finishes_epochs(tmp_path: Path) -> None:
    with Command(experiment(tmp_path), tmp_path) as command:
        for epoch in range(1, KILLS + 1):
            assert command.line(f"stage1: epoch {epoch}/") is not None, command.output[-3000:]
            kill_worker(command)
        assert command.end(PATIENCE_S) is not None, command.output[-3000:]
    assert command.process.returncode == 0, command.output[-3000:]


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_without_progress_ends_and_says_how_often(tmp_path: Path) -> None:
    with Command(experiment(tmp_path), tmp_path) as command:
        assert command.line("stage1: epoch 2/") is not None, command.output[-3000:]
        while command.end(0) is None:
            kill_or_ended(command)
        output = command.output
    assert command.process.returncode == 1, output[-3000:]
    assert "2 times without a finished epoch in between" in output, output[-3000:]
    assert command.resume


def kill_or_ended(command: Command) -> None:
    """Kills the next training worker, unless the command ends before there is one."""
    while command.end(0.05) is None:
        for process in titled([command.process.pid], WORKER):
            process.kill()
            return
