"""configs/imagenet.yaml on a folder of ImageNet's shape: its plan, and a step of each training.

Every image is one small JPEG. The packages' weights are random.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.imagenet import imagenet_wnids
from data_prep.manifest import TaskTable
from mantis_core.networks.cost import step_cost
from mantis_core.tasks import Batch, Problem, class_members
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.loop import Session
from mantis_core.training.recipe import Recipe
from mantis_core.training.stage1 import Stage1Recipe
from mantis_core.training.teacher import ready_teacher
from pipelines.chain import preflight
from pipelines.chain.dry_build import check_networks
from pipelines.chain.plan import Plan, make_plan
from pipelines.commands.chain import print_plan
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from pipelines.stages.spec import StageSpec, with_upstream
from pipelines.training.problem import problem_of_table
from tests.mantis_core.lite_package import empty_package, install
from tests.pipelines.fakes import same_code
from tests.root import ROOT

CONFIG = ROOT / "configs" / "imagenet.yaml"
BUDGET = 200e6  # multiply-adds of the client, which the config states
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand class folders of one image, for train and for val; all are the same file."""
    root = tmp_path_factory.mktemp("imagenet")
    Image.new("RGB", (40, 32), (90, 120, 30)).save(root / "image.jpg")
    for split in ("train", "val"):
        for wnid in imagenet_wnids():
            (root / split / wnid).mkdir(parents=True)
            os.link(root / "image.jpg", root / split / wnid / f"{wnid}_1.JPEG")
    return root


def plan_of(folder: Path, runs: Path, *overrides: str) -> Plan:
    places = [f"data.root={folder}", f"storage.root={runs}", "tracking.enabled=false"]
    return make_plan(load_settings(CONFIG, [*places, "cluster.workers=1", *overrides]))


def test_a_dry_run_says_what_the_training_of_all_classes_takes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: dict[bool, preflight.Fit] = {}

    def tried(
        settings: Settings, trainings: list[StageSpec], table: TaskTable, possible: list[bool]
    ) -> Mapping[bool, preflight.Fit]:
        """In this process, and once."""
        found.update(found or preflight._tried(settings, trainings, table, possible))
        return found

    same_code(monkeypatch)
    monkeypatch.setattr(preflight, "tried_networks", tried)
    install(tmp_path / "packages", monkeypatch)
    empty_package(tmp_path / "packages", monkeypatch, "efficientnet_lite2")
    plan = plan_of(folder, tmp_path / "runs")
    assert sorted(plan.table.classes) == list(imagenet_wnids())
    assert [task.name for task in plan.table.tasks][-2:] == ["clothing", "others"]
    specs = with_upstream(plan.specs, "stage1")
    print_plan(plan, specs, as_json=False)
    said = capsys.readouterr().out
    assert "client: 186.1 million multiply-adds for an image of 224 x 224 pixels" in said
    assert "768 of 990 rows per epoch" in said
    assert "2.25 G multiply-adds an image, 20.7 T in all: 0.83 s on a GPU, 23 min on a CPU" in said
    assert "a step takes about 20.3 GiB a worker in float32" in said
    assert "note: times are estimated, not measured: for one GPU that gets 50 TFLOP/s" in said
    print_plan(plan, specs, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    prepare, stage1 = printed["stages"]
    assert prepare["effort"] is None
    assert stage1["effort"]["macs"] == stage1["effort"]["macs_per_image"] * 768 * 12
    assert stage1["effort"]["worker_bytes"] == pytest.approx(20.3 * 2**30, rel=0.01)
    assert printed["client"]["macs"] <= BUDGET


class Untrained:
    """Weights of stages that have not run: the packages', and those of a stage 1 made here."""

    def __init__(self) -> None:
        self.stage1: dict[str, Tensor] = {}

    def teacher(self, settings: Settings, problem: Problem) -> Teacher:
        return ready_teacher(settings.teacher, problem, None)

    def check(self, teacher: Teacher, settings: Settings, problem: Problem) -> None:
        """Random weights only guess."""

    def tensors(self, kind: str) -> dict[str, Tensor]:
        assert kind == "stage1"
        return self.stage1


def batch_of(problem: Problem) -> Batch:
    draw = torch.Generator().manual_seed(0)
    size = (BATCH, 3, *problem.image_size)
    labels = torch.randint(len(problem.classes), (BATCH,), generator=draw)
    mask = class_members(problem.tasks, len(problem.classes)).T[labels]
    own = [
        [task.classes.index(label) if label in task.classes else -1 for task in problem.tasks]
        for label in labels.tolist()
    ]
    images = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    return Batch(images, labels, torch.tensor(own), mask, {}, torch.arange(BATCH))


def moved(recipe: Recipe, before: Mapping[str, Tensor], part: str) -> bool:
    after = recipe.student.state_dict()
    names: Sequence[str] = [name for name in before if name.startswith(part)]
    assert names
    return any(not torch.equal(after[name], before[name]) for name in names)


@pytest.mark.slow
def test_every_training_takes_a_step_that_costs_what_was_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("efficientnet_lite0", "efficientnet_lite2"):
        install(tmp_path / "packages", monkeypatch, name)
    batches = [f"{section}.batch_size={BATCH}" for section in ("stage1", "stage2")]
    plan = plan_of(folder, tmp_path / "runs", *batches)
    problem = problem_of_table(plan.table, plan.settings.data, True)
    trainings = [spec for spec in plan.specs if spec.stage.trains]
    said = check_networks(trainings, plan.table, single_class=True)
    weights: Any = Untrained()
    batch = batch_of(problem)
    for spec in trainings:
        build = STAGES[spec.kind].recipe
        assert build is not None
        recipe = build(spec.settings, problem, weights).train()
        cost = step_cost(recipe, lambda recipe=recipe: recipe(batch, 0.0).loss)  # type: ignore[misc]
        assert cost.macs / BATCH == pytest.approx(said[spec.name].macs, rel=0.01), spec.name
        assert cost.saved_bytes / BATCH == pytest.approx(said[spec.name].saved_bytes, rel=0.1)
        session = Session(recipe, spec.training, steps_per_epoch=1, seed=0)
        before = {name: tensor.clone() for name, tensor in recipe.student.state_dict().items()}
        output = session.step(batch)
        assert torch.isfinite(output.loss)
        assert moved(recipe, before, "stem." if spec.kind == "local" else "client.stem.")
        if isinstance(recipe, Stage1Recipe):
            weights.stage1 = recipe.student.shipped()
        else:
            assert "bits" not in output.sums or output.sums["bits"] > 0
