"""Loss terms: torchdistill criteria by name, and ours, composed from the config. No optimiser.

A criterion is called with (student io, teacher io, batch). An io dict maps a module path to
{"output": tensor}, as torchdistill's ForwardHookManager gives it, and holds what the recipe itself
computed under "outputs". Each criterion tells means and how many entries are behind each, so that
its value over all workers' rows can be told too. Shapes: B batch, K tasks, n labels of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision.datasets  # noqa: F401  (torchdistill looks for it among the loaded modules)
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    nll_loss,
    softmax,
)
from torchdistill.losses.high_level import WeightedSumLoss
from torchdistill.losses.mid_level import SimpleLossWrapper
from torchdistill.losses.registry import LOSS_DICT

from mantis_core.config import LossTerm
from mantis_core.errors import ModelError
from mantis_core.tasks import IGNORE, Batch, TaskSpec
from mantis_core.training.means import Mean

Io = Mapping[str, Any]


class Criterion(nn.Module):
    """A loss term of what a recipe computed: the sum of means, each over entries of its own."""

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        """The means on these rows; as many for every batch, at the same places."""
        raise NotImplementedError

    def forward(self, student: Io, teacher: Io, batch: Batch) -> Tensor:
        """Their sum (), the term's value on these rows alone; 0 where nothing is compared."""
        values = [mean.value for mean in self.means(student, teacher, batch)]
        return torch.stack(values).sum() if values else torch.zeros((), device=batch.image.device)


class RelativeMSE(nn.Module):
    """Mean squared error over the mean square of the target: layers of any scale compare."""

    def forward(self, value: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape (B, ...) to a scalar; no gradient to the target."""
        return self.mean(value, target).value

    def mean(self, value: Tensor, target: Tensor) -> Mean:
        """The quotient with its divisor, summed over images: both are means over all images."""
        target = target.detach().float()
        scale = target.square().mean().clamp_min(1e-6)
        return Mean((value.float() - target).square().mean() / scale, scale * len(target))


class TeacherLogits(Criterion):
    """KL from the teacher's distributions to the student's, flat or summed over tasks' heads.

    Hinton et al. 2014, with temperature squared in front. For heads a task, over its own images;
    a segmentation's is the mean over all their pixels.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], temperature: float = 1.0) -> None:
        super().__init__()
        self.tasks, self.temperature = tasks, temperature

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, theirs = student["outputs"], teacher["outputs"]
        if "logits" in theirs:
            everyone = torch.ones(len(batch), dtype=torch.bool, device=batch.image.device)
            return [_divergence(ours["logits"], theirs["logits"], everyone, self.temperature)]
        keys = {f"logits/{task.name}": k for k, task in enumerate(self.tasks)}
        return [
            _divergence(ours[key], theirs[key], batch.task_mask[:, k], self.temperature)
            for key, k in keys.items()
            if key in theirs
        ]


class TaskDetection(Criterion):
    """Binary cross-entropy of the task logits, summed over tasks, mean over images.

    `distill` > 0 mixes that share of the teacher's probability of each task into the target: the
    sum of its flat softmax over the task's classes.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], distill: float = 0.0) -> None:
        super().__init__()
        self.tasks, self.distill = tasks, distill

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        logits = student["outputs"]["task_logits"].float()
        target = batch.task_mask.float()
        if self.distill and "logits" in teacher["outputs"]:
            soft = softmax(teacher["outputs"]["logits"].float(), dim=1)
            posterior = torch.stack(
                [
                    soft[:, list(task.classes)].sum(dim=1) if task.classes else target[:, k]
                    for k, task in enumerate(self.tasks)
                ],
                dim=1,
            )
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
        self.distill = distill

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        logits = student["outputs"]["class_logits"]
        known = batch.class_label >= 0
        target = torch.where(known, batch.class_label, logits.shape[1] - 1)
        loss = Mean(cross_entropy(logits.float(), target), len(batch))
        if "logits" not in teacher["outputs"]:
            return [loss]
        theirs = teacher["outputs"]["logits"]
        kl = _divergence(logits[:, : theirs.shape[1]], theirs, known, 1.0)
        return [loss.times(1 - self.distill), kl.times(self.distill)]


class TaskLosses(Criterion):
    """Sum over tasks of the mean cross-entropy over the task's own images (0 where it has none).

    A classification tail also learns to say "not mine" on the others' images, with the weight
    `not_mine`.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], not_mine: float = 0.2) -> None:
        super().__init__()
        self.tasks, self.not_mine = tasks, not_mine

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, means = student["outputs"], []
        for k, task in enumerate(self.tasks):
            output = ours["tasks"][task.name].float()
            active = ours["loss_mask"][:, k]
            if task.is_classification:
                loss = nll_loss(output, batch.labels[:, k].clamp_min(0), reduction="none")
                means.append(_mean_over(loss, active))
                others = ~batch.task_mask[:, k]
                means.append(_mean_over(-output[:, -1], others).times(self.not_mine))
            else:
                means.append(_pixel_loss(output, batch.segmentation[task.name], active))
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
        return [_mean_over(loss, known)]


class TeacherDecision(Criterion):
    """KL from the teacher's flat distribution to the joint decision, or task by task.

    Without a joint decision a task is compared with the teacher's head of that task, or with the
    flat logits of its classes, as they compare among themselves. A segmentation's is the mean over
    all pixels of its images. A task that the teacher does not know costs nothing.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], temperature: float = 1.0) -> None:
        super().__init__()
        self.tasks, self.temperature = tasks, temperature

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, theirs = student["outputs"], teacher["outputs"]
        if "logits" in theirs and "joint" in ours:
            everyone = torch.ones(len(batch), dtype=torch.bool, device=batch.image.device)
            return [_divergence(ours["joint"], theirs["logits"], everyone, self.temperature)]
        means = []
        for k, task in enumerate(self.tasks):
            target = theirs.get(f"logits/{task.name}")
            if target is None and "logits" in theirs and task.is_classification:
                target = theirs["logits"][:, list(task.classes)]
            if target is not None:
                mine = ours["tasks"][task.name]
                if task.is_classification:
                    mine = mine[:, :-1]
                active = ours["loss_mask"][:, k]
                means.append(_divergence(mine, target, active, self.temperature))
        return means


class FlatLabels(Criterion):
    """Cross-entropy of flat logits with the image's class, or of each head with its task's labels.

    What a teacher and the individual models are trained with.
    """

    def __init__(self, tasks: tuple[TaskSpec, ...], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tasks, self.label_smoothing = tasks, label_smoothing

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        ours, means = student["outputs"], []
        if "logits" in ours:
            known = batch.class_label >= 0
            loss = cross_entropy(
                ours["logits"].float(),
                batch.class_label.clamp_min(0),
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            return [_mean_over(loss, known)]
        for k, task in enumerate(self.tasks):
            output, active = ours[f"logits/{task.name}"].float(), batch.task_mask[:, k]
            if task.is_classification:
                loss = cross_entropy(
                    output,
                    batch.labels[:, k].clamp_min(0),
                    reduction="none",
                    label_smoothing=self.label_smoothing,
                )
                means.append(_mean_over(loss, active))
            else:
                means.append(_pixel_loss(output, batch.segmentation[task.name], active))
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


def check_detection(terms: Mapping[str, LossTerm], *, names_classes: bool) -> None:
    """Raises ModelError for a term on class logits where the detector names tasks alone."""
    for name, term in terms.items():
        if term.criterion == "ClassDetection" and not names_classes:
            raise ModelError(
                f"losses.{name}: ClassDetection trains a detector that names classes, and this one "
                f"names tasks: set model.detector.classes=true, or losses.{name}=null"
            )


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


def _pixel_loss(logits: Tensor, truth: Tensor, active: Tensor) -> Mean:
    """Mean cross-entropy (B, n, H, W) over labelled pixels (B, H, W) of active images (B,)."""
    valid = (truth != IGNORE) & active[:, None, None]
    target = truth.long().masked_fill(~valid, 0)
    return _mean_over(cross_entropy(logits, target, reduction="none"), valid)


def _mean_over(values: Tensor, keep: Tensor) -> Mean:
    """Sum over the kept entries / their count; 0, in the graph, where there is none."""
    weight = keep.to(values.dtype)
    count = weight.sum()
    return Mean((values * weight).sum() / count.clamp_min(1), count)


def _divergence(ours: Tensor, theirs: Tensor, keep: Tensor, temperature: float) -> Mean:
    """Mean over kept images, and pixels, of logits (B, n) or (B, n, H, W); `keep` is (B,)."""
    divergence = kl_div(
        log_softmax(ours.float() / temperature, dim=1),
        log_softmax(theirs.detach().float() / temperature, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    everywhere = keep.reshape(-1, *[1] * (divergence.dim() - 1)).expand_as(divergence)
    return _mean_over(divergence, everywhere).times(temperature**2)


CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "TeacherLogits": TeacherLogits,
    "TaskDetection": TaskDetection,
    "ClassDetection": ClassDetection,
    "TaskLosses": TaskLosses,
    "JointDecision": JointDecision,
    "TeacherDecision": TeacherDecision,
    "FlatLabels": FlatLabels,
}

DETECTION = ("TaskDetection", "ClassDetection")
"""The criteria that train the detector."""

LOW_LEVEL: dict[str, Callable[..., nn.Module]] = {"RelativeMSE": RelativeMSE}
