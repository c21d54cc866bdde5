"""`mantis check`: runs random images through every component, without Ray, MLflow or files."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

from mantis_core.architecture import ModelConfig
from mantis_core.baselines.uncompressed import individual_recipe
from mantis_core.codec.checkpoint import load_model, save_model
from mantis_core.config import IndividualConfig, LossTerm, Stage1Config, Stage2Config, TeacherConfig
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.training.loop import Session, fit
from mantis_core.training.recipe import Recipe
from mantis_core.training.stage1 import Stage1Student, stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from mantis_core.training.teacher import new_teacher, teacher_recipe

SIZE, IMAGES = 32, 8
ARMS = (("film", "primary"), ("film", "per_task"), ("none", "shared"))

STAGE2 = Stage2Config(
    epochs=1,
    losses={
        "detection": LossTerm(criterion="TaskDetection"),
        "tasks": LossTerm(criterion="TaskLosses"),
        "distillation": LossTerm(criterion="TeacherDecision"),
    },
)


def run() -> dict[str, Any]:
    """Trains, encodes and decodes with every component for one step.

    Returns {"ok", one line for each component, "seconds"}. Raises the error of a broken component.
    """
    began = time.monotonic()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for several threads
    problem, batch = _problem(), _batch()
    teacher_config = TeacherConfig(name="shufflenet_v2_x0_5", weights="train", split="stage2")
    found: dict[str, Any] = {}

    def trained(name: str, recipe: Recipe, config: Any) -> Session:
        session = Session(recipe, config, steps_per_epoch=1, seed=0)
        loss = next(fit(session, lambda _: [batch], lambda: [batch]))["train/loss"]
        found[name] = f"loss {loss:.3f}"
        return session

    teaching = teacher_config.training.model_copy(update={"epochs": 1})
    trained("teacher", teacher_recipe(teacher_config, problem, seed=0), teaching)
    teacher = new_teacher(teacher_config, problem)
    stage1 = Stage1Config(epochs=1)
    session = trained(
        "stage 1", stage1_recipe(stage1, ModelConfig(), teacher, problem, seed=0), stage1
    )
    student = session.best_student()
    assert isinstance(student, Stage1Student)
    for kind, prior in ARMS:
        model = ModelConfig.model_validate({"conditioning": {"kind": kind}, "prior": prior})
        recipe = stage2_recipe(STAGE2, model, teacher, problem, student.shipped(), seed=0)
        codec: Any = trained(f"stage 2 {kind}/{prior}", recipe, STAGE2).best_student()
        codec.finish()
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, codec, {})
            codec = load_model(folder)
        streams = codec.encode(batch.image)
        answers = codec.decode(streams)
        assert [answer.wire_bytes for answer in answers] == [len(data) for data in streams]
        found[f"stage 2 {kind}/{prior}"] += f", {len(streams[0])} bytes an image"
    individual = IndividualConfig(epochs=1)
    trained("individual models", individual_recipe(teacher, problem, seed=0), individual)
    torch.set_num_threads(threads)
    return {"ok": True, **found, "seconds": round(time.monotonic() - began, 1)}


def _problem() -> Problem:
    tasks = (
        TaskSpec("first", "classification", 3, (0, 1, 2), ("a", "b", "c")),
        TaskSpec("second", "classification", 2, (3, 4), ("d", "e")),
        TaskSpec("areas", "segmentation", 3, (), ("x", "y", "z")),
    )
    names = ("a", "b", "c", "d", "e")
    return Problem(tasks, names, names, False, (SIZE, SIZE), SIZE)


def _batch() -> Batch:
    labels = torch.full((IMAGES, 3), -1)
    labels[:4, 0] = torch.tensor([0, 1, 2, 0])
    labels[2:6, 1] = torch.tensor([0, 1, 0, 1])
    mask = labels >= 0
    mask[5:, 2] = True
    areas = torch.randint(0, 3, (IMAGES, SIZE, SIZE)).to(torch.uint8)
    areas[:5] = 255
    return Batch(
        image=torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE)).to(torch.uint8),
        class_label=torch.full((IMAGES,), -1),
        labels=labels,
        task_mask=mask,
        segmentation={"areas": areas},
        row_id=torch.arange(IMAGES),
    )
