"""Loss terms: torchdistill criteria by name, and ours, composed from the config. No optimiser.

A criterion is called with (student io, teacher io, batch). An io dict maps a module path to
{"output": tensor}, as torchdistill's ForwardHookManager gives it, and holds what the recipe itself
computed under "outputs". Each criterion tells means with the number of entries behind each, which
workers need. All classification tasks are compared at once. B batch, K tasks, n labels of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision.datasets  # noqa: F401  (torchdistill looks for it among the loaded modules)
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softmax
from torchdistill.losses.high_level import WeightedSumLoss
from torchdistill.losses.mid_level import SimpleLossWrapper
from torchdistill.losses.registry import LOSS_DICT

from mantis_core.config import LossTerm
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import without_autocast
from mantis_core.networks.stacked import TaskLayout, TaskOutputs, as_stacked
from mantis_core.tasks import Batch, TaskSpec, class_members
from mantis_core.training.masked import (
    RelativeMSE,
    divergence,
    divergences,
    label_losses,
    mean_over,
    pixel_loss,
    smoothed_losses,
)
from mantis_core.training.means import Criterion, Io, Mean, as_factors


class TaskCriterion(Criterion):
    """A criterion that compares task by task: it knows where the tasks' labels stand."""

    classes: Tensor

    def __init__(self, tasks: tuple[TaskSpec, ...]) -> None:
        super().__init__()
        self.tasks, self.layout = tasks, TaskLayout(tasks)
        self.segmentations = [(k, t) for k, t in enumerate(tasks) if not t.is_classification]
        classes = torch.zeros(self.layout.is_label.shape, dtype=torch.int64)
        if flat := [c for task in tasks for c in task.classes]:
            classes = classes.masked_scatter(self.layout.is_label, torch.tensor(flat))
        self.register_buffer("classes", classes, persistent=False)

    def targets(self, theirs: Io, batch: Batch, mine: TaskOutputs) -> TaskOutputs:
        """The teacher's logits by task: its heads', or those of a task's classes; else `mine`."""
        if "logits" in theirs:
            return TaskOutputs(self.layout, theirs["logits"][:, self.classes], {})
        return self.heads(theirs, batch, mine)

    def heads(
        self, outputs: Io, batch: Batch, otherwise: Mapping[str, Tensor] | None = None
    ) -> TaskOutputs:
        """The logits of heads, "logits/<task>", by task.

        A classification without a head has the logits of `otherwise`, or 0; a segmentation none.
        """
        found = {}
        for task in self.tasks:
            if f"logits/{task.name}" in outputs:
                found[task.name] = outputs[f"logits/{task.name}"]
            elif task.is_classification:
                size = (len(batch), task.num_classes)
                nothing = torch.zeros(size, device=batch.image.device)
                found[task.name] = otherwise[task.name] if otherwise else nothing
        return as_stacked(found, self.layout)

    def divergences(
        self,
        ours: TaskOutputs,
        theirs: TaskOutputs,
        keep: Tensor,
        temperature: float,
        shares: Tensor | None = None,
    ) -> list[Mean]:
        """KL of each task that `theirs` has, over its kept images and pixels; `keep` is (B, K).

        `shares` (K,) are as `Conditions` has them.
        """
        counts = as_factors(shares, keep)
        means = []
        if ours.log_p is not None and theirs.log_p is not None:
            pair, active = (ours.log_p, theirs.log_p), self.layout.own(keep)
            mean = divergences(*pair, self.layout.is_label, active, temperature)
            means.append(mean.times(self.layout.own(counts[None])[0]))
        means += [
            divergence(ours[task.name], theirs[task.name], keep[:, k], temperature).times(counts[k])
            for k, task in self.segmentations
            if task.name in theirs
        ]
        return means


class TeacherLogits(TaskCriterion):
    """KL from the teacher's distributions to the student's, flat or summed over tasks' heads.

    Hinton et al. 2014, temperature squared in front. For heads a task, over its own images; a
    segmentation's is the mean over all their pixels.
    """

    reads_teacher = True

    def __init__(self, tasks: tuple[TaskSpec, ...], temperature: float = 1.0) -> None:
        super().__init__(tasks)
        self.temperature = temperature

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, theirs = student["outputs"], teacher["outputs"]
        if "logits" in theirs and "logits" in ours:
            return [divergence(ours["logits"], theirs["logits"], None, self.temperature)]
        mine = self.heads(ours, batch)
        target = self.targets(theirs, batch, mine)
        return self.divergences(mine, target, batch.task_mask, self.temperature)


class TaskDetection(Criterion):
    """Binary cross-entropy of the task logits, summed over tasks, mean over images.

    `distill` > 0 mixes that share of the teacher's probability of each task into the target: the
    sum of its flat softmax over the task's classes.
    """

    members: Tensor
    has_classes: Tensor

    def __init__(self, tasks: tuple[TaskSpec, ...], distill: float = 0.0) -> None:
        super().__init__()
        self.distill, self.reads_teacher = distill, distill > 0
        count = 1 + max((c for task in tasks for c in task.classes), default=0)
        members = class_members(tasks, count)
        self.register_buffer("members", members.T.float(), persistent=False)
        self.register_buffer("has_classes", members.any(dim=1), persistent=False)

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        logits = student["outputs"]["task_logits"].float()
        target = batch.task_mask.float()
        if self.distill and "logits" in teacher["outputs"]:
            soft = softmax(teacher["outputs"]["logits"].float(), dim=1)
            with without_autocast(soft):
                of_task = soft[:, : len(self.members)] @ self.members
            posterior = torch.where(self.has_classes, of_task, target)
            target = (1 - self.distill) * target + self.distill * posterior.clamp(0, 1)
        loss = binary_cross_entropy_with_logits(logits, target, reduction="none")
        return [Mean(loss.sum(dim=1).mean(), len(batch))]


class ClassDetection(Criterion):
    """Cross-entropy of the detector's class logits with the image's class or "none of them".

    `distill` > 0 mixes in that share of the KL from the teacher's flat distribution. For detectors
    that name classes (model.detector.classes).
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], distill: float = 0.5) -> None:
        super().__init__()
        self.distill, self.reads_teacher = distill, distill > 0

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        logits = student["outputs"]["class_logits"]
        known = batch.class_label >= 0
        target = torch.where(known, batch.class_label, logits.shape[1] - 1)
        loss = Mean(cross_entropy(logits.float(), target), len(batch))
        if "logits" not in teacher["outputs"]:
            return [loss]
        theirs = teacher["outputs"]["logits"]
        kl = divergence(logits[:, : theirs.shape[1]], theirs, known, 1.0)
        return [loss.times(1 - self.distill), kl.times(self.distill)]


class TaskLosses(TaskCriterion):
    """Sum over tasks of the mean cross-entropy over the task's own images (0 where it has none).

    A classification tail also learns to say "not mine" on the others' images, with the weight
    `not_mine`.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], not_mine: float = 0.2) -> None:
        super().__init__(tasks)
        self.not_mine = not_mine

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, layout = student["outputs"], self.layout
        outputs, means = as_stacked(ours["tasks"], layout), []
        counts = as_factors(ours.get("shares"), ours["loss_mask"])
        if outputs.log_p is not None:
            labels = layout.own(batch.labels)
            answers = torch.stack([labels, layout.not_mine.expand_as(labels)], dim=2)
            kept = [layout.own(ours["loss_mask"]), ~layout.own(batch.task_mask)]
            loss = label_losses(outputs.log_p.float(), answers)  # (B, N, 2)
            mine, others = mean_over(loss, torch.stack(kept, dim=2), dim=0).apart()
            means += [mine.times(layout.own(counts[None])[0]), others.times(self.not_mine)]
        for k, task in self.segmentations:
            truth, active = batch.segmentation[task.name], ours["loss_mask"][:, k]
            means.append(pixel_loss(outputs[task.name].float(), truth, active).times(counts[k]))
        return means


class ExitAnswers(TaskCriterion):
    """Sum over tasks of the mean cross-entropy of the client's own answers to what is asked."""

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours = student["outputs"]
        exits, asked = ours.get("exits") or (), ours["loss_mask"]
        counts, means = as_factors(ours.get("shares"), asked), []
        for k, logits in enumerate(exits):
            if logits.shape[1]:  # a segmentation has no head
                truth = batch.labels[:, k].clamp_min(0)
                loss = cross_entropy(logits.float(), truth, reduction="none")
                means.append(mean_over(loss, asked[:, k]).times(counts[k]))
        return means


class JointDecision(Criterion):
    """Cross-entropy of the joint decision over all classes, on images of one class.

    0 for data whose images have no single class: there is no joint decision.
    """

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        if "joint" not in student["outputs"]:
            return []
        scores = student["outputs"]["joint"].float()
        known = batch.class_label >= 0
        loss = cross_entropy(scores, batch.class_label.clamp_min(0), reduction="none")
        return [mean_over(loss, known)]


class TeacherDecision(TaskCriterion):
    """KL from the teacher's flat distribution to the joint decision, or task by task.

    A segmentation's is the mean over all pixels of its images. A task that the teacher does not
    know costs nothing.
    """

    reads_teacher = True

    def __init__(self, tasks: tuple[TaskSpec, ...], temperature: float = 1.0) -> None:
        super().__init__(tasks)
        self.temperature = temperature

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, theirs = student["outputs"], teacher["outputs"]
        if "logits" in theirs and "joint" in ours:
            return [divergence(ours["joint"], theirs["logits"], None, self.temperature)]
        mine = as_stacked(ours["tasks"], self.layout)
        target = self.targets(theirs, batch, mine)
        keep, shares = ours["loss_mask"], ours.get("shares")
        return self.divergences(mine, target, keep, self.temperature, shares)


class FlatLabels(TaskCriterion):
    """Cross-entropy of flat logits with the image's class, or of each head with its task's labels.

    What a teacher and the individual models are trained with.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], label_smoothing: float = 0.0) -> None:
        super().__init__(tasks)
        self.label_smoothing = label_smoothing

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, layout = student["outputs"], self.layout
        if "logits" in ours:
            known = batch.class_label >= 0
            loss = cross_entropy(
                ours["logits"].float(),
                batch.class_label.clamp_min(0),
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            return [mean_over(loss, known)]
        outputs, means = self.heads(ours, batch), []
        if outputs.log_p is not None:
            labels, active = layout.own(batch.labels), layout.own(batch.task_mask)
            loss = smoothed_losses(outputs.log_p, labels, layout.is_label, self.label_smoothing)
            means.append(mean_over(loss, active, dim=0))
        for k, task in self.segmentations:
            truth, active = batch.segmentation[task.name], batch.task_mask[:, k]
            means.append(pixel_loss(outputs[task.name].float(), truth, active))
        return means


def build_criterion(
    terms: Mapping[str, LossTerm], tasks: tuple[TaskSpec, ...], *, split: str, last: str
) -> WeightedSumLoss:
    """torchdistill's weighted sum of the configured terms.

    Raises ModelError for a name that neither `CRITERIA` nor torch and torchdistill know.
    """
    sub_terms: dict[str, dict[str, Any]] = {}
    for name, term in terms.items():
        if term.student is not None:
            criterion: nn.Module = SimpleLossWrapper(
                _low_level(name, term), **_wiring(name, term, split=split, last=last)
            )
        elif term.criterion in CRITERIA:
            build = CRITERIA[term.criterion]
            criterion = _construct(name, term, build, *(() if build is JointDecision else (tasks,)))
        else:
            raise ModelError(
                f"losses.{name}.criterion: {term.criterion!r} reads no module; allowed without "
                f"`student`: {', '.join(CRITERIA)}"
            )
        sub_terms[name] = {"criterion": criterion, "weight": term.weight}
    return WeightedSumLoss(sub_terms=sub_terms)


def hooked_paths(
    terms: Mapping[str, LossTerm], *, split: str, last: str
) -> tuple[list[str], list[str]]:
    """Module paths in the student and in the teacher whose outputs the terms read."""
    student = [t.student for t in terms.values() if t.student is not None]
    teacher = [_teacher_path(t.teacher, split, last) for t in terms.values() if t.teacher]
    return sorted(set(student)), sorted(set(teacher))


def measured_terms(
    criterion: WeightedSumLoss, student: Io, teacher: Io, batch: Batch
) -> dict[str, tuple[float, Sequence[Mean]]]:
    """Each term's weight and means; torchdistill's own forward is the sum of them all, weighted."""
    nothing = [Mean(torch.zeros((), device=batch.image.device), 0)]
    return {
        name: (weight, _means_of(term, student, teacher, batch) or nothing)
        for name, (term, weight) in criterion.term_dict.items()
    }


def _means_of(term: Any, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
    if isinstance(term, Criterion):
        return term.means(student, teacher, batch)
    # What SimpleLossWrapper does, with the count beside it.
    value = term.extract_value(student, term.input_module_path, term.input_key)
    target = term.extract_value(teacher, term.target_module_path, term.target_key)
    if isinstance(term.low_level_loss, RelativeMSE):
        return [term.low_level_loss.mean(value, target)]
    return [Mean(term.low_level_loss(value, target), len(batch))]


def _low_level(name: str, term: LossTerm) -> nn.Module:
    if term.criterion in LOW_LEVEL:
        return _construct(name, term, LOW_LEVEL[term.criterion])
    if term.criterion in LOSS_DICT and term.criterion.endswith("Loss"):
        loss = _construct(name, term, LOSS_DICT[term.criterion])
        if getattr(loss, "reduction", "mean") in ("sum", "none"):
            raise ModelError(
                f"losses.{name}.kwargs: reduction {loss.reduction!r} is no mean over images, so it "
                "would depend on the batch and the workers: leave it out, and set `weight`"
            )
        return loss
    raise ModelError(
        f"losses.{name}.criterion: {term.criterion!r} compares no two tensors; allowed with "
        f"`student`: {', '.join(LOW_LEVEL)} or a loss of torch.nn"
    )


def _construct(name: str, term: LossTerm, build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    try:
        return build(*args, **term.kwargs)
    except TypeError as error:
        raise ModelError(f"losses.{name}.kwargs do not fit {term.criterion}: {error}") from None


def _wiring(name: str, term: LossTerm, *, split: str, last: str) -> dict[str, Any]:
    if term.teacher is None:
        raise ModelError(f"losses.{name}: `student` is set, `teacher` is not")
    return {
        "input": {"is_from_teacher": False, "module_path": term.student, "io": "output"},
        "target": {
            "is_from_teacher": True,
            "module_path": _teacher_path(term.teacher, split, last),
            "io": "output",
        },
    }


def _teacher_path(path: str | None, split: str, last: str) -> str:
    return {"@split": split, "@last": last}.get(path or "", path or "")


CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "TeacherLogits": TeacherLogits,
    "TaskDetection": TaskDetection,
    "ClassDetection": ClassDetection,
    "TaskLosses": TaskLosses,
    "ExitAnswers": ExitAnswers,
    "JointDecision": JointDecision,
    "TeacherDecision": TeacherDecision,
    "FlatLabels": FlatLabels,
}

LOW_LEVEL: dict[str, Callable[..., nn.Module]] = {"RelativeMSE": RelativeMSE}
