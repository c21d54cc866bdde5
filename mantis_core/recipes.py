"""What each training stage computes from a batch: the student, its loss, its eval-mode figures.

No optimiser, no loop, no data: `training.py` drives a recipe, whatever it is. Shapes: B batch,
K tasks, C latent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchdistill.core.forward_hook import ForwardHookManager

from mantis_core.bottleneck import Bottleneck
from mantis_core.client import Client, TaskDetector, coverage_threshold, primary_task
from mantis_core.config import (
    LossTerm,
    ModelConfig,
    Stage1Config,
    Stage2Config,
)
from mantis_core.errors import ModelError
from mantis_core.hits import decision_hits, label_hits
from mantis_core.inference import still
from mantis_core.losses import DETECTION, build_criterion, hooked_paths, weighted_terms
from mantis_core.model import Mantis
from mantis_core.preprocessing import normalise
from mantis_core.server import FeatureDecoder
from mantis_core.tasks import Batch, TaskSpec
from mantis_core.teacher import Teacher, freeze

logger = logging.getLogger(__name__)

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepOutput:
    """Loss to minimise, and figures as sums over `count` images (reduced by sum and count)."""

    loss: Tensor
    sums: dict[str, Tensor]
    count: int


class Recipe(nn.Module):
    """One stage's computation. `student` is trained and shipped, everything else is frozen.

    `loaded` are name prefixes of the student's parameters that come trained from upstream.
    """

    student: nn.Module
    loaded: tuple[str, ...] = ()

    def __init__(self, tasks: Sequence[TaskSpec], losses: Mapping[str, LossTerm]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.losses = dict(losses)
        self.teacher: Teacher | None = None

    def set_teacher(self, teacher: Teacher | None, split: str = "", last: str = "") -> None:
        """Takes the frozen teacher and wires the loss terms to its modules and the student's."""
        self.teacher = None if teacher is None else freeze(teacher)  # type: ignore[assignment]
        self.criterion = build_criterion(self.losses, self.tasks, split=split, last=last)
        self.paths = hooked_paths(self.losses, split=split, last=last)
        _require_modules("student", self.student, self.paths[0])
        if teacher is not None:
            _require_modules("teacher", teacher.backbone.net, self.paths[1])

    def train(self, mode: bool = True) -> Self:
        """As usual, but the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """One batch at `progress` (0 to 1 through training) to its loss and figures."""
        raise NotImplementedError

    def calibrate(self, student: nn.Module, holdout: Iterable[Batch], gather: Gather) -> None:
        """Sets what is fitted to held-back rows and not by gradient, on `student`, in place.

        `holdout` may be this worker's share; `gather` then joins (N, ...) tensors of all shares.
        """

    def teach(self, images: Tensor) -> dict[str, Any]:
        """The teacher's io dict on normalised images: hooked modules and its outputs."""
        assert self.teacher is not None
        teacher = self.teacher
        with torch.no_grad():
            return _watch(teacher.backbone.net, self.paths[1], lambda: teacher(images), images)

    def student_io(self, images: Tensor, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs the student and returns its io dict for the hooked modules and its outputs."""
        return _watch(self.student, self.paths[0], run, images)

    def total(
        self, student: dict[str, Any], teacher: dict[str, Any], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the weighted terms, and each as a figure named loss/<term>."""
        terms = weighted_terms(self.criterion, student, teacher, batch)
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        return loss, {f"loss/{name}": value.detach() * len(batch) for name, value in terms.items()}


class Stage1Student(nn.Module):
    """Task-agnostic codec: client, one shared prior, decoder, and the teacher's frozen tail.

    x ─ stem ─┬─ encoder ─ bottleneck ─ decoder ─ tail (frozen) ─▶ features, logits
              └─ detector ─▶ task logits
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        *,
        image_size: tuple[int, int],
        split_shape: tuple[int, int, int],
        latent_size: tuple[int, int],
        tail: nn.Module,
        members: Tensor | None = None,
    ) -> None:
        super().__init__()
        plain = config.model_copy(
            update={"conditioning": config.conditioning.model_copy(update={"kind": "none"})}
        )
        channels = config.encoder.latent_channels
        self.client = Client(plain, num_tasks, members)
        self.bottleneck = Bottleneck(
            channels,
            num_tasks,
            "shared",
            quantizer=config.quantizer,
            neighbour_contexts=config.neighbour_contexts,
        )
        self.decoder = FeatureDecoder(
            channels,
            split_shape,
            latent_size,
            channels=config.decoder.channels,
            blocks=config.decoder.blocks,
        )
        self.tail = freeze(tail)

    def train(self, mode: bool = True) -> Stage1Student:
        """As usual, but the tail keeps the teacher's statistics."""
        super().train(mode)
        self.tail.eval()
        return self

    def shipped(self) -> dict[str, Tensor]:
        """The state dict that stage 2 starts from: without the teacher's tail."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("tail.")}


class Stage1Recipe(Recipe):
    """Rate + distillation of the teacher's features: L = sum of terms + rate_weight * bits."""

    def __init__(self, student: Stage1Student, teacher: Teacher, config: Stage1Config) -> None:
        super().__init__(teacher.tasks, config.losses)
        self.student: Stage1Student = student
        self.config = config
        _check_detector(student.client.detector, config.losses)
        if not any(term.criterion in DETECTION for term in config.losses.values()):
            freeze(student.client.detector)  # it would get no gradient
        self.set_teacher(teacher, split=teacher.split, last=teacher.backbone.names[-1])

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        images, student = normalise(batch.image), self.student
        teacher_io = self.teach(images)

        def run() -> dict[str, Any]:
            view = student.client(images)
            task_logits = view.logits
            latent = student.client.encode(view, torch.sigmoid(task_logits))
            everyone = torch.ones_like(task_logits, dtype=torch.bool)
            received = student.bottleneck(latent, everyone, task_logits.argmax(dim=1))
            split = student.decoder(received.y_hat)
            last = student.tail(split)
            assert self.teacher is not None
            logits = self.teacher.decide(split, last, (images.shape[2], images.shape[3]))
            seen = {"task_logits": task_logits, "class_logits": view.class_logits}
            return {"bits": received.bits, **seen, **logits}

        io = self.student_io(images, run)
        loss, sums = self.total(io, teacher_io, batch)
        outputs = io["outputs"]
        rate = rate_weight(self.config, progress, training=self.training)
        loss = loss + rate * outputs["bits"].mean()
        sums |= label_hits(outputs, self.tasks, batch)
        sums["bits"] = outputs["bits"].detach().sum()
        return StepOutput(loss, sums, len(batch))


class Stage2Recipe(Recipe):
    """Detection + task losses + rate on the whole codec, stem frozen."""

    loaded = ("client.encoder", "server.decoder", "server.trunk")

    def __init__(self, student: Mantis, teacher: Teacher, config: Stage2Config) -> None:
        super().__init__(student.spec.tasks, config.losses)
        self.student: Mantis = student
        self.config = config
        freeze(student.client.stem)
        _check_detector(student.client.detector, config.losses)
        if student.joint is None and "JointDecision" in {t.criterion for t in self.losses.values()}:
            logger.warning("JointDecision has no effect: images of this data have no single class")
        self.set_teacher(teacher, split=teacher.split, last=teacher.backbone.names[-1])

    def train(self, mode: bool = True) -> Self:
        """As usual, but stem and teacher stay in eval mode."""
        super().train(mode)
        self.student.client.stem.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        batch = self._own(batch)
        images, student = normalise(batch.image), self.student
        teacher_io = self.teach(images)

        def run() -> dict[str, Any]:
            view = student.client(images)
            task_logits = view.logits
            detected = torch.sigmoid(task_logits.float())
            condition, mask, loss_mask = self._condition(detected.detach(), batch, progress)
            latent = student.client.encode(view, condition)
            primary = primary_task(detected.detach(), mask)
            received = student.bottleneck(latent, mask, primary)
            tasks = student.server(received.y_hat, (images.shape[2], images.shape[3]))
            out = {
                "bits": received.bits,
                "task_logits": task_logits,
                "class_logits": view.class_logits,
                "tasks": tasks,
                "mask": mask,
                "loss_mask": loss_mask,
            }
            if student.joint is not None:
                log_p = torch.nn.functional.logsigmoid(task_logits.float())
                out["joint"] = student.joint(tasks, log_p)
                prior = log_p.detach().masked_fill(~mask, -torch.inf)
                out["decision"] = student.joint(tasks, prior).argmax(dim=1)
            return out

        io = self.student_io(images, run)
        loss, sums = self.total(io, teacher_io, batch)
        outputs = io["outputs"]
        rate = rate_weight(self.config, progress, training=self.training)
        loss = loss + rate * outputs["bits"].mean()
        sums |= decision_hits(outputs, self.tasks, batch)
        sums["bits"] = outputs["bits"].detach().sum()
        return StepOutput(loss, sums, len(batch))

    def calibrate(self, student: nn.Module, holdout: Iterable[Batch], gather: Gather) -> None:
        """The mask threshold that keeps the configured coverage of true tasks."""
        assert isinstance(student, Mantis)
        found, truth = [], []
        with torch.no_grad(), still(student):
            for batch in holdout:
                view = student.client(normalise(batch.image))
                found.append(torch.sigmoid(view.logits.float()))
                truth.append(self._own(batch).task_mask)
        limit = student.spec.model.max_active_tasks
        threshold = coverage_threshold(
            gather(torch.cat(found)),
            gather(torch.cat(truth)),
            student.spec.model.coverage,
            limit=limit,
        )
        student.mask_threshold.fill_(threshold)

    def _own(self, batch: Batch) -> Batch:
        """The batch with this codec's tasks, which may be one of all classes."""
        return batch.as_one_task() if self.student.spec.model.single_task else batch

    def _condition(
        self, detected: Tensor, batch: Batch, progress: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder reads, what the stream would carry, and whose losses count.

        In training a share of images is forced to the truth, some of those to a random subset of
        it, each size from one task on as likely as any other; the others, and all images in eval
        mode, follow the detector.
        """
        mask = self.student.select_mask(detected)
        truth = batch.task_mask
        if not self.training:
            return detected, mask, truth
        first, last = self.config.teacher_forcing
        share = first + (last - first) * progress
        count, device = len(batch), detected.device
        forced = (torch.rand(count, device=device) < share) & truth.any(dim=1)
        order = torch.rand(truth.shape, device=device).masked_fill(~truth, 2.0).argsort().argsort()
        size = (torch.rand(count, device=device) * truth.sum(dim=1)).floor() + 1
        chosen = truth & (order < size[:, None])
        subset = torch.rand(count, device=device) < self.config.subset_fraction
        wanted = torch.where(subset[:, None], chosen, truth)
        forced = forced[:, None]
        return (
            torch.where(forced, wanted.float(), detected),
            torch.where(forced, wanted, mask),
            torch.where(forced, wanted, truth),
        )


def _check_detector(detector: TaskDetector, losses: Mapping[str, LossTerm]) -> None:
    for name, term in losses.items():
        if term.criterion == "ClassDetection" and detector.members is None:
            raise ModelError(
                f"losses.{name}: ClassDetection trains a detector that names classes, and this one "
                f"names tasks: set model.detector.classes=true, or losses.{name}=null"
            )


def rate_weight(config: Stage1Config | Stage2Config, progress: float, *, training: bool) -> float:
    """The rate weight at `progress`: a linear ramp at the start of training, full in eval mode."""
    if not training or config.rate_ramp_fraction == 0:
        return config.rate_weight
    return config.rate_weight * min(1.0, progress / config.rate_ramp_fraction)


def _require_modules(whose: str, module: nn.Module, paths: Sequence[str]) -> None:
    """ModelError for a path that a loss term names and the module lacks."""
    for path in paths:
        try:
            module.get_submodule(path)
        except AttributeError:
            has = ", ".join(name for name, _ in module.named_children())
            raise ModelError(
                f"a loss term compares {whose} module {path!r}, which this model lacks; at its top "
                f"are {has}. A term set to null is left out"
            ) from None


def _watch(
    module: nn.Module, paths: list[str], run: Callable[[], dict[str, Any]], images: Tensor
) -> dict[str, Any]:
    """The io dict of `module`'s submodules at `paths` while `run` ran, and what it returned."""
    hooks = ForwardHookManager(images.device)
    for path in paths:
        hooks.add_hook(module, path, requires_input=False, requires_output=True)
    try:
        outputs = run()
        return {**hooks.pop_io_dict(), "outputs": outputs}
    finally:
        hooks.clear()
