"""Tiny codecs from images to figures: one task, many, a segmentation alone, several classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mantis_core.baselines.local import local_classifier
from mantis_core.codec.mantis import Mantis
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import Teacher
from pipelines.evaluation.answers import run_local, run_teacher
from pipelines.evaluation.arms import Arrays
from pipelines.evaluation.rows import with_pixels_summed
from pipelines.evaluation.split_pass import Evaluated, arm_figures
from tests.mantis_core.conftest import (
    GROUND,
    TASKS,
    make_batch,
    make_codec,
    make_config,
    make_problem,
)
from tests.pipelines.evaluation.measured import rows_of

SINGLE = make_problem()
ONE = replace(
    SINGLE,
    tasks=(TaskSpec("animals", "classification", 6, tuple(range(6)), SINGLE.class_names),),
)
MANY = replace(
    SINGLE,
    tasks=tuple(
        TaskSpec(f"pair{a}{b}", "classification", 2, (a, b))
        for a, b in [(0, 1), (2, 3), (4, 5), (0, 2), (1, 3), (4, 0), (5, 1), (2, 5), (3, 4)]
    )
    + TASKS,
)
SEGMENTATION = replace(
    make_problem(single_class=False), tasks=(GROUND,), classes=(), class_names=()
)
BESIDE = replace(SINGLE, tasks=(*TASKS, GROUND))  # one class an image, and a segmentation
PROBLEMS = {
    "one task": ONE,
    "twelve tasks": MANY,
    "a segmentation alone": SEGMENTATION,
    "a segmentation beside one class an image": BESIDE,
    "images of several classes": make_problem(single_class=False),
}


def arrays_of(batch: Batch) -> Arrays:
    """A batch as the reader gives it."""
    names = ("image", "class_label", "labels", "task_mask", "row_id")
    masks = {f"segmentation/{name}": mask.numpy() for name, mask in batch.segmentation.items()}
    return {**{name: getattr(batch, name).numpy() for name in names}, **masks}


def measured(rows: Arrays, batch: Arrays, problem: Problem) -> dict[str, object]:
    """The figures of an arm whose rows are those of one batch; they must be JSON."""
    own = {
        **with_pixels_summed(rows),
        **{n: batch[n] for n in ("row_id", "class_label", "labels", "task_mask")},
    }
    done = Evaluated({"arm": own}, problem.tasks, problem.single_class, problem.image_size)
    found = arm_figures(done, "arm")
    json.dumps(found, allow_nan=False)
    return found


@pytest.fixture(scope="module", params=PROBLEMS)
def world(request: pytest.FixtureRequest) -> tuple[Problem, Mantis, Arrays]:
    problem = PROBLEMS[request.param]
    return problem, make_codec(problem), arrays_of(make_batch(problem))


@pytest.mark.parametrize("oracle", [False, True])
def test_every_set_of_tasks_has_figures(
    world: tuple[Problem, Mantis, Arrays], oracle: bool
) -> None:
    problem, codec, batch = world
    images = torch.from_numpy(batch["image"])
    rows = rows_of(codec, images, batch, problem, "oracle" if oracle else "mantis")
    found = measured(rows, batch, problem)
    metrics = found["metrics"]
    headline = "val/miou" if problem is SEGMENTATION else "val/top1"
    assert 0 <= metrics[headline] <= 1
    assert metrics["val/wire_bytes"] > 0
    assert ("val/detection/exact_match" in metrics) is not oracle
    if not oracle:
        assert np.shape(found["detector_confusion"]) == (len(problem.tasks),) * 2
    answers = [json.loads(text, parse_constant=pytest.fail) for text in rows["answer"]]
    assert all(answer["tasks"] for answer in answers)


def test_the_teacher_of_every_set_of_tasks_has_figures(
    world: tuple[Problem, Mantis, Arrays],
) -> None:
    problem, _, batch = world
    teacher = Teacher(
        "resnet18",
        split="layer2",
        tasks=problem.tasks,
        flat_classes=len(problem.classes) if problem.single_class else 0,
        image_size=problem.image_size,
    ).eval()
    with torch.no_grad():
        rows = run_teacher(teacher, torch.from_numpy(batch["image"]), batch, problem)
    metrics = measured(rows, batch, problem)["metrics"]
    assert 0 <= metrics["val/miou" if problem is SEGMENTATION else "val/top1"] <= 1


def test_pixel_counts_of_a_batch_are_kept_once() -> None:
    counts = np.arange(24).reshape(4, 6)
    packed = with_pixels_summed({"confusion/ground": counts, "answered": np.zeros(4, bool)})
    first, *others = packed["confusion/ground"]
    assert np.frombuffer(first, np.int64).tolist() == counts.sum(axis=0).tolist()
    assert others == [b"", b"", b""]
    assert packed["answered"].tolist() == [False] * 4


def test_a_stream_of_a_segmentation_alone_names_no_image_right() -> None:
    batch = arrays_of(make_batch(BESIDE, classes=(0,)))  # all images are of class 0
    batch["task_mask"] = np.array([[False, False, False, True]] * 8)
    rows = rows_of(make_codec(BESIDE), torch.from_numpy(batch["image"]), batch, BESIDE, "oracle")
    assert (rows["class_index"] == -1).all()
    assert "val/top1" not in measured(rows, batch, BESIDE)["metrics"]  # nothing was asked


@pytest.mark.parametrize("single_class", [True, False])
def test_a_classifier_on_the_device_answers_each_request(single_class: bool) -> None:
    problem = make_problem(single_class=single_class)
    batch = make_batch(problem, 6)
    torch.manual_seed(0)
    model = local_classifier(make_config(requests="asked"), problem).eval()
    with torch.no_grad():
        rows = run_local(model, batch.image, arrays_of(batch), problem)
    named = [k for k, task in enumerate(problem.tasks) if task.is_classification]
    assert (rows["predicted"][:, named] >= 0).all()
    assert rows["decoded"].all()
    assert set(rows["request_session_bytes"][:, named].ravel()) == {3.0}
    assert (rows["request_wire_bytes"] > rows["request_session_bytes"] + 8).all()
    every = rows["request_session_bytes"].mean(axis=1)
    np.testing.assert_allclose(rows["session_bytes"], every)
    if not single_class:
        assert (rows["request_session_bytes"][:, 3] > 3).all()  # a mask
        counted = rows["confusion/ground"].sum()
        assert counted == 6 * 32 * 28  # four rows of a mask are unlabelled


def test_a_classifier_that_is_not_asked_sends_the_class() -> None:
    problem = make_problem()
    batch = make_batch(problem, 6)
    torch.manual_seed(0)
    model = local_classifier(make_config(), problem).eval()
    with torch.no_grad():
        rows = run_local(model, batch.image, arrays_of(batch), problem)
    assert ((rows["class_index"] >= 0) & (rows["class_index"] < 6)).all()
    assert (rows["request_session_bytes"] == -1).all()
    assert set(rows["session_bytes"]) <= {3.0, 4.0}
    for k, task in enumerate(problem.tasks):
        for row in range(6):
            index = rows["class_index"][row]
            own = task.classes.index(index) if index in task.classes else -1
            assert rows["predicted"][row, k] == own
