"""Processes killed while tasks are added to a trained codec: it recovers, or says how to resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mantis_core.codec.checkpoint import save_model
from tests.faults.matrix import (
    EPOCHS,
    RUN,
    VICTIMS,
    Cell,
    ClusterRay,
    Experiment,
    Moment,
    campaign,
    complaints,
    differing,
    table,
)
from tests.pipelines.export.codecs import codec_of

ADD_TASK = ("add-task", "codec", *RUN[1:])
MOMENTS = [Moment(Cell("extend", victim), "extend", epoch) for victim, epoch in VICTIMS.items()]


def extension(folder: Path, *, images: Path | None = None) -> Experiment:
    """A folder with images, a codec, and a config that adds tasks to it."""
    experiment = Experiment(folder, images=images)
    config = yaml.safe_load(experiment.config.read_text())
    config = {name: config[name] for name in ("data", "tasks", "cluster", "storage")}
    config["extend"] = {"epochs": EPOCHS, "batch_size": 16}
    config["evaluate"] = {"batch_size": 8}
    experiment.config.write_text(yaml.safe_dump(config))
    save_model(folder / "codec", codec_of("asked"), {"step": 1})
    return experiment


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_every_cell_of_an_extension_recovers_or_says_how_to_resume(tmp_path: Path) -> None:
    unkilled = extension(tmp_path / "unkilled")
    killed = extension(tmp_path / "killed", images=unkilled.images)
    with ClusterRay() as ray:
        campaign(unkilled, ADD_TASK, [], ray)
        rows = campaign(killed, ADD_TASK, MOMENTS, ray)
    print(table(rows))
    assert len(unkilled.weights()) == 1
    assert complaints(killed, rows) + differing(killed, unkilled) == [], table(rows)
    assert unkilled.logged().keys()
