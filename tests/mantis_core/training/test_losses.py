"""Loss terms; what holds for every entry of the dicts is in tests/test_contracts.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from mantis_core.config import LossTerm
from mantis_core.errors import ModelError
from mantis_core.tasks import IGNORE, Batch, Problem
from mantis_core.training.losses import (
    ClassDetection,
    FlatLabels,
    JointDecision,
    RelativeMSE,
    TaskDetection,
    TaskLosses,
    TeacherDecision,
    TeacherLogits,
    build_criterion,
    hooked_paths,
    measured_terms,
)
from mantis_core.training.means import Objective, loss_of

NOTHING: dict[str, Any] = {"outputs": {}}


def io(**outputs: Any) -> dict[str, Any]:
    return {"outputs": outputs}


def task_outputs(problem: Problem, count: int) -> dict[str, Tensor]:
    """What a server's tails give: log P with "not mine", or pixel logits."""
    draw = torch.Generator().manual_seed(3)
    return {
        task.name: log_softmax(torch.randn(count, task.num_classes + 1, generator=draw), 1)
        if task.is_classification
        else torch.randn(count, task.num_classes, 32, 32, generator=draw)
        for task in problem.tasks
    }


def test_relative_mse_does_not_depend_on_the_scale_and_spares_the_target() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    target = torch.randn(2, 3, requires_grad=True)
    loss = RelativeMSE()(value, target)
    torch.testing.assert_close(loss, RelativeMSE()(10 * value, 10 * target))
    assert float(RelativeMSE()(target.detach(), target)) == 0
    loss.backward()
    assert value.grad is not None
    assert target.grad is None


def test_teacher_logits_is_zero_on_equal_logits_whatever_the_temperature(batch: Batch) -> None:
    logits = torch.randn(len(batch), 6)
    for temperature in (1.0, 4.0):
        term = TeacherLogits((), temperature=temperature)
        assert float(term(io(logits=logits), io(logits=logits + 3), batch)) == pytest.approx(
            0, abs=1e-5
        )
        assert float(term(io(logits=logits), io(logits=-logits), batch)) > 0


def test_teacher_logits_compares_a_head_on_its_own_images_only(
    problem: Problem, batch: Batch
) -> None:
    ours = {f"logits/{t.name}": torch.randn(len(batch), t.num_classes) for t in problem.tasks}
    theirs = {key: value.clone() for key, value in ours.items()}
    away = ~batch.task_mask[:, 0]
    theirs["logits/animals"][away] += torch.randn(int(away.sum()), 3)
    term = TeacherLogits(problem.tasks)
    assert float(term(io(**ours), io(**theirs), batch)) == pytest.approx(0, abs=1e-5)
    theirs["logits/animals"][~away] += torch.tensor([1.0, 0.0, -1.0])
    assert float(term(io(**ours), io(**theirs), batch)) > 0.01


def test_heads_learn_from_a_flat_teachers_logits_of_their_classes(
    problem: Problem, batch: Batch
) -> None:
    torch.manual_seed(0)
    flat = torch.randn(len(batch), 6)
    heads = {
        f"logits/{task.name}": flat[:, list(task.classes)] + 3.0
        for task in problem.tasks
        if task.is_classification
    }
    term = TeacherLogits(problem.tasks)
    assert float(term(io(**heads), io(logits=flat), batch)) == pytest.approx(0, abs=1e-5)
    first = problem.tasks[0]
    mine = torch.zeros(len(batch), first.num_classes)
    loss = term(io(**{**heads, f"logits/{first.name}": mine}), io(logits=flat), batch)
    p = torch.softmax(flat[:, list(first.classes)], dim=1)
    kl = (p * (p.log() + math.log(first.num_classes))).sum(dim=1)
    assert float(loss) == pytest.approx(float(kl[batch.task_mask[:, 0]].mean()), rel=1e-4)


def test_detection_is_binary_cross_entropy_summed_over_tasks(
    problem: Problem, batch: Batch
) -> None:
    zero = torch.zeros(len(batch), 3)
    loss = TaskDetection(problem.tasks)(io(task_logits=zero), NOTHING, batch)
    assert float(loss) == pytest.approx(3 * math.log(2))


def test_distilled_detection_takes_the_teachers_mass_of_a_tasks_classes(
    problem: Problem, batch: Batch
) -> None:
    probabilities = torch.tensor([0.1, 0.1, 0.2, 0.1, 0.3, 0.2])
    teacher = io(logits=probabilities.log().expand(len(batch), -1))
    posterior = torch.tensor([0.4, 0.4, 0.5])
    term = TaskDetection(problem.tasks, distill=1.0)
    student = posterior.logit().expand(len(batch), -1).clone().requires_grad_()
    term(io(task_logits=student), teacher, batch).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


def test_class_detection_is_cross_entropy_and_the_teachers_share(
    problem: Problem, batch: Batch
) -> None:
    label = batch.class_label.clone()
    label[0] = -1
    batch = replace(batch, class_label=label)
    target = torch.where(label >= 0, label, 6)
    student = torch.randn(len(batch), 7)
    teacher = torch.randn(len(batch), 6)
    hard, soft = (
        ClassDetection(problem.tasks, distill=share)(
            io(class_logits=student), io(logits=teacher), batch
        )
        for share in (0.0, 1.0)
    )
    torch.testing.assert_close(hard, cross_entropy(student, target))
    ours, theirs = log_softmax(student[1:, :6], 1), log_softmax(teacher[1:], 1)
    by_hand = (theirs.exp() * (theirs - ours)).sum(1).mean()
    torch.testing.assert_close(soft, by_hand)
    alike = io(class_logits=torch.cat([teacher, student[:, :1]], 1))
    none = ClassDetection(problem.tasks, distill=1.0)(alike, io(logits=teacher), batch)
    assert float(none) == pytest.approx(0, abs=1e-6)


def test_task_losses_is_the_mean_over_each_tasks_own_images(problem: Problem, batch: Batch) -> None:
    tasks = task_outputs(problem, len(batch))
    student = io(tasks=tasks, loss_mask=batch.task_mask)
    by_hand = sum(
        -tasks[task.name][rows, batch.labels[rows, k]].mean()
        for k, task in enumerate(problem.tasks)
        for rows in [batch.task_mask[:, k]]
    )
    loss = TaskLosses(problem.tasks, not_mine=0.0)(student, NOTHING, batch)
    torch.testing.assert_close(loss, by_hand)


def test_a_tail_learns_not_mine_from_other_tasks_images_only(
    problem: Problem, batch: Batch
) -> None:
    logits = {t.name: torch.zeros(len(batch), t.num_classes + 1) for t in problem.tasks}
    for value in logits.values():
        value.requires_grad_()
    tasks = {name: log_softmax(value, 1) for name, value in logits.items()}
    nobody = torch.zeros_like(batch.task_mask)
    TaskLosses(problem.tasks)(io(tasks=tasks, loss_mask=nobody), NOTHING, batch).backward()
    for k, task in enumerate(problem.tasks):
        gradient = logits[task.name].grad
        assert gradient is not None
        assert (gradient[batch.task_mask[:, k]] == 0).all()
        assert (gradient[~batch.task_mask[:, k], -1] < 0).all()


def test_a_task_absent_from_a_batch_costs_nothing_and_gives_no_nan(problem: Problem) -> None:
    count = 4
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    nobody = torch.zeros(count, 3, dtype=torch.bool)
    unknown = torch.full((count,), -1)
    batch = Batch(images, unknown, unknown[:, None].expand(-1, 3), nobody, {}, unknown)
    tasks = {k: v.requires_grad_() for k, v in task_outputs(problem, count).items()}
    joint = torch.randn(count, 6, requires_grad=True)
    heads = {f"logits/{t.name}": torch.randn(count, t.num_classes) for t in problem.tasks}
    student = io(tasks=tasks, loss_mask=nobody, joint=joint, **heads)
    teacher = io(**heads)
    for term in (
        TaskLosses(problem.tasks, not_mine=0.0),
        JointDecision(),
        TeacherDecision(problem.tasks),
        TeacherLogits(problem.tasks),
        FlatLabels(problem.tasks),
    ):
        assert term(student, teacher, batch).tolist() == 0
    loss = TaskLosses(problem.tasks, not_mine=0.0)(student, NOTHING, batch)
    loss.backward()  # still in the graph: DistributedDataParallel waits for every gradient
    assert all(v.grad is not None and (v.grad == 0).all() for v in tasks.values())


def test_ignored_pixels_and_inactive_images_do_not_count_in_segmentation(
    mixed_problem: Problem, batch_of: Any
) -> None:
    batch = batch_of(mixed_problem)
    tasks = task_outputs(mixed_problem, len(batch))
    term = TaskLosses(mixed_problem.tasks[-1:], not_mine=0.0)
    only = replace(batch, task_mask=batch.task_mask[:, -1:])
    loss = term(io(tasks=tasks, loss_mask=only.task_mask), NOTHING, only)
    active = only.task_mask[:, 0]
    by_hand = cross_entropy(
        tasks["ground"][active], batch.segmentation["ground"][active].long(), ignore_index=IGNORE
    )
    torch.testing.assert_close(loss, by_hand)


def test_joint_decision_reads_only_images_of_one_class(batch: Batch) -> None:
    scores = torch.randn(len(batch), 6)
    some = replace(batch, class_label=batch.class_label.clone())
    some.class_label[::2] = -1
    loss = JointDecision()(io(joint=scores), NOTHING, some)
    torch.testing.assert_close(loss, cross_entropy(scores[1::2], batch.class_label[1::2]))


def test_flat_labels_smooths_and_reads_the_flat_head_where_there_is_one(batch: Batch) -> None:
    logits = torch.randn(len(batch), 6)
    loss = FlatLabels((), label_smoothing=0.1)(io(logits=logits), NOTHING, batch)
    by_hand = cross_entropy(logits, batch.class_label, label_smoothing=0.1)
    torch.testing.assert_close(loss, by_hand)


def test_teacher_decision_is_zero_where_the_decision_is_the_teachers(batch: Batch) -> None:
    logits = torch.randn(len(batch), 6)
    term = TeacherDecision(())
    value = term(io(joint=logits - 2), io(logits=logits), batch)
    assert float(value) == pytest.approx(0, abs=1e-5)


def test_tails_are_compared_with_a_flat_teachers_rows_where_there_is_no_joint_decision(
    mixed_problem: Problem, batch_of: Any
) -> None:
    batch = batch_of(mixed_problem)
    logits = torch.randn(len(batch), 6)
    tasks = {k: v.requires_grad_() for k, v in task_outputs(mixed_problem, len(batch)).items()}
    student = io(tasks=tasks, loss_mask=batch.task_mask)
    loss = TeacherDecision(mixed_problem.tasks)(student, io(logits=logits), batch)
    by_hand = 0
    for k, task in enumerate(mixed_problem.tasks[:3]):
        active = batch.task_mask[:, k]
        ours = log_softmax(tasks[task.name][active, :-1], 1)
        theirs = log_softmax(logits[active][:, list(task.classes)], 1)
        by_hand += (theirs.exp() * (theirs - ours)).sum(1).mean()
    assert float(loss.detach()) > 0
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(tasks[task.name].grad.abs().sum() > 0 for task in mixed_problem.tasks[:3])
    assert tasks["ground"].grad is None  # a flat teacher knows no pixels


def test_a_segmentation_is_distilled_pixel_by_pixel_on_its_own_images(
    mixed_problem: Problem, batch_of: Any
) -> None:
    batch = batch_of(mixed_problem)
    ground = mixed_problem.tasks[-1:]
    ours = task_outputs(mixed_problem, len(batch))["ground"]
    theirs = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    active = batch.task_mask[:, -1]
    assert 0 < int(active.sum()) < len(batch)
    p, q = theirs.softmax(1), ours.softmax(1)
    by_hand = (p * (p / q).log()).sum(1)[active].mean()
    teacher = io(**{"logits/ground": theirs})
    only = replace(batch, task_mask=active[:, None])
    decided = io(tasks={"ground": ours}, loss_mask=only.task_mask)
    torch.testing.assert_close(TeacherDecision(ground)(decided, teacher, only), by_hand)
    stage1 = io(**{"logits/ground": ours})
    torch.testing.assert_close(TeacherLogits(ground)(stage1, teacher, only), by_hand)


def two_terms() -> dict[str, LossTerm]:
    return {
        "labels": LossTerm(criterion="FlatLabels", weight=0.5),
        "near": LossTerm(criterion="MSELoss", weight=2.0, student="a", teacher="@split"),
        "far": LossTerm(
            criterion="HuberLoss", kwargs={"delta": 2.0}, student="b.c", teacher="@last"
        ),
    }


def test_the_terms_sum_to_torchdistills_own_forward(batch: Batch) -> None:
    criterion = build_criterion(two_terms(), (), split="layer2", last="layer4")
    student = {
        "outputs": {"logits": torch.randn(len(batch), 6)},
        "a": {"output": torch.randn(2, 3)},
        "b.c": {"output": torch.randn(2, 3)},
    }
    teacher = {
        "outputs": {},
        "layer2": {"output": torch.randn(2, 3)},
        "layer4": {"output": torch.randn(2, 3)},
    }
    measured = measured_terms(criterion, student, teacher, batch)
    loss, terms = loss_of([Objective(measured)])
    whole = criterion({"student": student, "teacher": teacher}, {}, batch)
    torch.testing.assert_close(loss, whole)
    near = nn.functional.mse_loss(student["a"]["output"], teacher["layer2"]["output"])
    torch.testing.assert_close(terms["near"], 2 * near)


def test_the_hooked_paths_are_those_the_terms_name() -> None:
    paths = hooked_paths(two_terms(), split="layer2", last="layer4")
    assert paths == (["a", "b.c"], ["layer2", "layer4"])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (LossTerm(criterion="TaskLoses"), r"losses\.mine\.criterion: 'TaskLoses'.*TaskLosses"),
        (LossTerm(criterion="MSELoss"), "reads no module"),
        (
            LossTerm(criterion="RelativMSE", student="a", teacher="b"),
            r"losses\.mine\.criterion: 'RelativMSE'.*RelativeMSE",
        ),
        (LossTerm(criterion="Linear", student="a", teacher="b"), "compares no two tensors"),
        (
            LossTerm(criterion="TaskLosses", kwargs={"not_mein": 1}),
            r"losses\.mine\.kwargs do not fit TaskLosses: .*not_mein",
        ),
        (LossTerm(criterion="MSELoss", student="a"), "`student` is set, `teacher` is not"),
        (
            LossTerm(criterion="MSELoss", student="a", teacher="b", kwargs={"reduction": "sum"}),
            r"losses\.mine\.kwargs: reduction 'sum' .* leave it out",
        ),
    ],
)
def test_a_wrong_term_is_refused_by_its_key_and_with_what_is_allowed(
    term: LossTerm, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_criterion({"mine": term}, (), split="layer2", last="layer4")
