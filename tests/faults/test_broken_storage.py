"""Storage that fails in the middle: each trouble is told in one message, and mended as it says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.faults.harness import PATIENCE_S, Command
from tests.faults.matrix import EPOCHS, Experiment


def run(experiment: Experiment, arguments: Sequence[str], code: int) -> Command:
    """The command, ended, with that exit code."""
    with Command(arguments, experiment.folder) as command:
        assert command.end(PATIENCE_S) is not None, command.output
    assert command.process.returncode == code, command.output
    return command


def errors(command: Command) -> list[str]:
    return [line.strip() for _, line in command.lines if line.startswith("error: ")]


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_a_damaged_shard_a_full_disk_and_a_cut_checkpoint_cost_a_message_each(
    tmp_path: Path,
) -> None:
    experiment = Experiment(tmp_path / "e")
    config = yaml.safe_load(experiment.config.read_text())
    config["teacher"]["weights"] = str(experiment.folder / "teacher.safetensors")
    config["cluster"]["max_failures"] = 0
    experiment.config.write_text(yaml.safe_dump(config))
    stages, arguments = experiment.folder / "runs/stages", ["stage1", "--config", "config.yaml"]

    run(experiment, ["prepare", "--config", "config.yaml"], 0)
    (prepared,) = stages.glob("prepare-*")
    shard = next((prepared / "shards").glob("train-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (message,) = errors(run(experiment, arguments, 2))
    assert f"shard {shard} is missing or damaged" in message.replace("file://", "")
    assert f"delete {prepared}" in message.replace("file://", "")
    shutil.rmtree(prepared)

    training = experiment.folder / "runs/training"
    with Command(arguments, experiment.folder) as command:
        assert command.line("stage1: epoch 1/") is not None, command.output
        training.rename(experiment.folder / "elsewhere")
        training.write_text("a file where a folder should be: as unwritable for root as for others")
        assert command.end(PATIENCE_S) is not None, command.output
    assert command.process.returncode == 2, command.output
    (message,) = errors(command)
    assert "cannot be written" in message
    assert "runs/training" in message
    training.unlink()
    (experiment.folder / "elsewhere").rename(training)

    with Command(arguments, experiment.folder) as command:
        assert command.line("stage1: epoch 3/") is not None, command.output
        command.process.kill()
        assert command.end(PATIENCE_S) is not None, command.output
    assert command.resume == arguments
    found = next(training.iterdir()).glob("checkpoint_*")
    newest = max(path for path in found if path.is_dir())  # beside them are Ray's notes
    state = newest / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    output = run(experiment, arguments, 0).output
    told = [line for line in output.splitlines() if "cannot be used" in line]
    assert len(told) == 1, output
    assert newest.name in told[0]
    assert "resuming from checkpoint_" in told[0]
    (history,) = experiment.logged().values()
    assert history == list(range(1, EPOCHS + 1))
