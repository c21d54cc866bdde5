"""benchmarks/overfit.py: what is averaged, over which images, and what a missing stage says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import overfit
from benchmarks.overfit import first_images, losses
from mantis_core.tasks import Batch
from tests.mantis_core.conftest import make_batch, make_problem, make_stage1
from tests.pipelines.experiment import paint, write_config


def test_every_image_weighs_the_same_whatever_the_batches() -> None:
    problem = make_problem()
    recipe = make_stage1(problem, network="resnet18").train()
    one, two = make_batch(problem, 6, seed=1), make_batch(problem, 2, seed=2)
    alone = losses(recipe, [one]), losses(recipe, [two])
    both = losses(recipe, [one, two])
    assert not recipe.training
    assert both["bits"] > 0
    for name in ("loss/split", "bits"):
        wanted = (6 * alone[0][name] + 2 * alone[1][name]) / 8
        assert both[name] == pytest.approx(wanted, abs=2e-4)


def test_no_more_images_are_taken_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_batch(make_problem(), 8)
    arrays = {"image": whole.image.numpy(), "row_id": np.arange(8)}
    monkeypatch.setattr(overfit, "local_batches", lambda *_, **__: iter([arrays, arrays]))
    monkeypatch.setattr(Batch, "from_arrays", staticmethod(lambda given: given["row_id"]))
    for images, sizes in ((5, [5]), (8, [8]), (11, [8, 3]), (100, [8, 8])):
        taken = list(first_images("nowhere", None, None, "val", images))  # type: ignore[arg-type]
        assert [len(each) for each in taken] == sizes


def test_a_stage_that_was_not_trained_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "images", train=2)
    config = str(write_config(tmp_path))
    root = f"storage.root={tmp_path / 'runs'}"
    monkeypatch.setattr(sys, "argv", ["overfit", "nowhere", "--config", config, root])
    with pytest.raises(SystemExit) as ended:
        overfit.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/runs has no finished stage1 of this config")
