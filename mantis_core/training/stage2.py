"""Stage 2: detection, task losses and rate on the whole codec.

Shapes: B batch, K tasks, H W input pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.bitstream.task_field import MAX_LEVEL
from mantis_core.codec.checkpoint import save_model
from mantis_core.codec.mantis import Mantis, MantisOutput
from mantis_core.codec.masks import coverage_threshold
from mantis_core.codec.own_answer import ClientAnswer, Fusion, confidence_counts
from mantis_core.codec.spec import model_spec
from mantis_core.config import Stage2Config
from mantis_core.errors import ModelError
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.cost import with_wide_encoder
from mantis_core.networks.detector import View
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.server import ClassificationTail
from mantis_core.rates import levels_of, weight_at
from mantis_core.tasks import Batch, Problem, TaskSpec, class_members, one_task
from mantis_core.teachers.teacher import Teacher, freeze
from mantis_core.training.asking import Asking
from mantis_core.training.hits import decision_hits
from mantis_core.training.recipe import (
    DETECTION,
    Gather,
    Measured,
    Recipe,
    check_detection,
    check_exits,
    model_in_training,
    ramp,
    rate_weight,
    without_detection,
)

logger = logging.getLogger(__name__)

_FROM_STAGE1 = ("client.stem.", "client.encoder.", "server.decoder.")
_DETECTOR = "client.detector."
_AT_ENDS = 0.25  # the share of images that are coded at the lowest or the highest rate
_FACTS = 5  # of an image, beside its outputs: see `_answers_and_outputs`


def stage2_recipe(
    config: Stage2Config,
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    stage1: Mapping[str, Tensor],
    *,
    seed: int,
) -> Recipe:
    """The whole codec, from stage 1's weights and the teacher's tail and rows.

    Raises ModelError if `model.single_task` is set and images have no single class.
    """
    if model.wide_encoder:
        members = class_members(problem.tasks, len(problem.classes))
        model = with_wide_encoder(model, len(problem.tasks), problem.image_size, members)
    if model.wide_encoder or model.requests == "asked":
        config = config.model_copy(update={"losses": without_detection(config.losses)})
    if model.requests == "asked":
        # A server asks about one task, not which of all classes an image shows.
        problem = replace(problem, single_class=False)
        losses = {n: t for n, t in config.losses.items() if t.criterion != "JointDecision"}
        config = config.model_copy(update={"losses": losses})
    torch.manual_seed(seed)
    if model.single_task:
        problem = one_task(problem)
    codec, loaded = started_codec(
        model_in_training(model, config), teacher, problem, stage1, rates=config.rate_weights
    )
    return Stage2Recipe(codec, teacher, config, loaded=loaded)


def started_codec(
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    stage1: Mapping[str, Tensor],
    *,
    rates: tuple[float, ...] = (),
) -> tuple[Mantis, frozenset[str]]:
    """A codec with the weights of `stage1`, the teacher's blocks as trunk, its rows as tails.

    Returns it with the names of all tensors that do not start at random.
    """
    trunk = teacher.backbone.tail_after(teacher.split).requires_grad_(True)  # it may be frozen
    codec = Mantis(model_spec(model, teacher, problem, rates), trunk=trunk)
    of_trunk = {name for name in codec.state_dict() if name.startswith("server.trunk.")}
    loaded = start_from_stage1(codec, stage1) | start_tails_from_teacher(codec, teacher)
    return codec, frozenset(loaded | of_trunk)


def start_from_stage1(model: Mantis, stage1: Mapping[str, Tensor]) -> set[str]:
    """Loads stem, encoder, detector, decoder and density of stage 1, one density into every row.

    A detector of another number of tasks keeps its own last layer, and its own parts where stage 1
    has trained none. Returns the names of the tensors that were loaded.
    """
    own = model.state_dict()
    start: dict[str, Tensor] = {}
    for name, value in stage1.items():
        if name.startswith("bottleneck.table"):
            continue
        target = f"server.{name}" if name.startswith("decoder.") else name
        if target.startswith("bottleneck.context_") and target in own:
            many = own[target].ndim > value.ndim
            value = value.expand_as(own[target]) if many else value  # each rate begins alike
        if target.startswith("bottleneck.density.") and target in own:
            rows = own[target].shape[0] // max(1, value.shape[0]) if value.ndim else 1
            value = value.repeat(rows, *([1] * (value.ndim - 1))) if rows > 1 else value
        if target in own and own[target].shape == value.shape:
            start[target] = value
    parts = {".".join(name.split(".")[:3]) for name in stage1 if name.startswith(_DETECTOR)}
    wanted = (*_FROM_STAGE1, *(f"{part}." for part in parts))
    missing = [
        name
        for name in own
        if name.startswith(wanted)
        and ".by_level." not in name
        and (name not in start and own[name].shape[:1] != (len(model.spec.tasks),))
    ]
    assert not missing, f"stage 1 lacks {missing[:3]}"
    model.load_state_dict({**own, **start})
    return set(start)


def start_tails_from_teacher(model: Mantis, teacher: Teacher) -> set[str]:
    """Starts each tail from the teacher's own head or rows, and "not mine" from zero.

    Returns the names of the tensors that were loaded.
    """
    loaded: set[str] = set()
    with torch.no_grad():
        for task in model.spec.tasks:
            own = model.server.tails[task.name]
            names = {f"server.tails.{task.name}.{name}" for name in own.state_dict()}
            if not task.is_classification:
                if task.name in teacher.heads:
                    own.load_state_dict(teacher.heads[task.name].state_dict())
                    loaded |= names
                continue
            assert isinstance(own, ClassificationTail)
            tail = own.linear
            if teacher.flat_classes:
                rows = torch.tensor(task.classes)
                weight, bias = teacher.flat_head.weight[rows], teacher.flat_head.bias[rows]
            elif task.name in teacher.heads:
                head = teacher.heads[task.name]
                assert isinstance(head, nn.Linear)
                weight, bias = head.weight, head.bias
            else:
                continue
            tail.weight[:-1].copy_(weight)
            tail.bias[:-1].copy_(bias)
            tail.weight[-1].zero_()
            tail.bias[-1].fill_(0.0)
            loaded |= names
    return loaded


class Stage2Recipe(Recipe):
    """Detection + task losses + rate on the whole codec, the stem frozen or not."""

    level_weights: Tensor

    def __init__(
        self,
        student: Mantis,
        teacher: Teacher,
        config: Stage2Config,
        *,
        loaded: Collection[str],
    ) -> None:
        super().__init__(student.spec.tasks, config.losses)
        self.student: Mantis = student
        self.loaded = loaded
        self.config = config
        self.asking = Asking(config, student.spec.model, student.spec.task_names)
        if config.freeze_stem:
            freeze(student.client.stem)
        if student.spec.single_class:
            student.bottleneck.most_active = _most_active(student)
        names_classes = student.client.detector.members is not None
        check_detection(config.losses, names_classes=names_classes)
        check_exits(config.losses, has_heads=student.client.exits is not None)
        self._check_reach(teacher)
        self.set_teacher(teacher, split=teacher.split, last=teacher.backbone.names[-1])
        rates, levels = student.spec.rates, range(student.spec.rate_levels)
        weights = torch.tensor([weight_at(rates, level) for level in levels] if rates else [])
        self.held_levels = levels_of(rates)
        self.register_buffer("level_weights", weights, persistent=False)

    def _check_reach(self, teacher: Teacher) -> None:
        """Freezes what no term of detection reaches; ModelError if none reaches a task's answer.

        A trained parameter must get a gradient, or workers would wait for it. Warns of a term that
        has no effect.
        """
        criteria = {term.criterion for term in self.losses.values()}
        silent = [task.name for task in self.tasks if not _knows(teacher, task)]
        joint = self.student.joint is not None
        if "JointDecision" in criteria and not joint:
            logger.warning("JointDecision has no effect: images of this data have no single class")
        if "TeacherDecision" in criteria and silent and not (joint and teacher.flat_classes):
            logger.warning(
                "TeacherDecision has no effect on %s: the teacher has no head for it",
                ", ".join(silent),
            )
        decides = joint and (
            "JointDecision" in criteria
            or ("TeacherDecision" in criteria and teacher.flat_classes > 0)
        )
        if not (decides or criteria.intersection(DETECTION)):
            freeze(self.student.client.for_detection_alone())
        untrained = [
            task.name
            for task in self.tasks
            if not (
                "TaskLosses" in criteria
                or ("TeacherDecision" in criteria and task.name not in silent)
                or (decides and task.is_classification)
            )
        ]
        if untrained:
            raise ModelError(
                f"stage2.losses: none of {', '.join(self.losses)} trains the answer of "
                f"{', '.join(untrained)}: add a term with criterion TaskLosses"
            )

    def train(self, mode: bool = True) -> Self:
        """Switches the mode; a frozen stem and the teacher stay in eval mode."""
        super().train(mode)
        if self.config.freeze_stem:
            self.student.client.stem.eval()
        return self

    def measure(self, batch: Batch, progress: float) -> Measured:
        batch = self._own(batch)
        images, student = normalise(batch.image), self.student
        teacher_io = self.teach(images)
        with self.watch_student() as student_io:
            view = student.client(images)
            detected = torch.sigmoid(view.logits.float()).detach()
            condition, mask, loss_mask, forced, shares = self.asking(
                detected, student.select_mask(detected), batch, progress
            )
            heard = None
            if student.fusion is not None and self.training:
                # The answer of a forced image would be one within its true task.
                heard = torch.rand(len(batch), device=images.device) >= self.config.answer_dropout
                heard &= ~forced
            level = self._levels(batch)
            output: MantisOutput = student(
                images, condition, mask, view=view, heard=heard, level=level
            )
        computed = {name: value for name, value in output._asdict().items() if value is not None}
        student_io["outputs"] = {**computed, "loss_mask": loss_mask, "shares": shares}
        if level is None:
            rate = rate_weight(self.config, progress, training=self.training) * output.bits.mean()
        else:
            share = ramp(self.config, progress, training=self.training)
            rate = share * (self.level_weights[level] * output.bits).mean()
        objective = self.objective(student_io, teacher_io, batch, rate)
        if self.asking.always:
            batch = replace(batch, task_mask=batch.task_mask & mask)
        sums = decision_hits(computed, student.server.layout, batch)
        return Measured((objective,), {**sums, "bits": output.bits.detach().sum()})

    def calibrate(self, student: nn.Module, holdout: Iterable[Batch], gather: Gather) -> None:
        """Sets the mask threshold at which `model.coverage` of the true tasks are kept.

        Of a client that sends its answers also what the server makes of them, and their tables.
        """
        assert isinstance(student, Mantis)
        if self.asking.always:
            return
        nobody = student.mask_threshold.new_zeros(0, len(student.spec.tasks))
        found, truth = [nobody], [nobody.bool()]  # a worker may have no rows
        answers = [nobody.new_zeros(0, student.server.layout.width + _FACTS)]
        with torch.no_grad(), still(student):
            for batch in holdout:
                own, images = self._own(batch), normalise(batch.image)
                view = student.client(images)
                found.append(torch.sigmoid(view.logits.float()))
                truth.append(own.task_mask)
                if student.fusion is not None:
                    answers.append(_answers_and_outputs(student, images, view, own))
        limit = student.spec.model.max_active_tasks
        threshold = coverage_threshold(
            gather(torch.cat(found)),
            gather(torch.cat(truth)),
            student.spec.model.coverage,
            limit=limit,
        )
        student.mask_threshold.fill_(threshold)
        if student.fusion is not None:
            _calibrate_answers(student, student.fusion, gather(torch.cat(answers)).cpu())

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Makes the tables of the codec and writes it; its config says what it is, not `kind`."""
        assert isinstance(student, Mantis)
        student.finish()
        save_model(folder, student, meta)

    def _levels(self, batch: Batch) -> Tensor | None:
        """The rate level of each image (B,), None for a model of one rate.

        In training at random, the two ends more often, for nothing lies beyond them. In eval mode
        `level`.
        """
        count = self.student.spec.rate_levels
        if count == 1:
            return None
        if not self.training:
            return torch.full_like(batch.row_id, self.level)
        device, rows = batch.image.device, len(batch)
        drawn = torch.randint(count, (rows,), device=device)
        ends = torch.randint(2, (rows,), device=device) * (count - 1)
        return torch.where(torch.rand(rows, device=device) < _AT_ENDS, ends, drawn)

    def _own(self, batch: Batch) -> Batch:
        """The batch with this codec's tasks, which may be one of all classes."""
        return batch.as_one_task() if self.student.spec.model.single_task else batch


def _knows(teacher: Teacher, task: TaskSpec) -> bool:
    """Whether the teacher has logits of a task's labels."""
    return task.is_classification if teacher.flat_classes else task.name in teacher.heads


def _answers_and_outputs(student: Mantis, images: Tensor, view: View, batch: Batch) -> Tensor:
    """What `_calibrate_answers` reads of normalised images, (B, W + _FACTS), with `layout.width` W.

    The server's log P of the primary task by itself; then the client's label, the level of its
    confidence, the right place among the outputs, the level of the task's probability, the rate.
    """
    layout, count = student.server.layout, len(images)
    nobody = torch.zeros(count, dtype=torch.bool, device=images.device)
    level = batch.row_id % student.spec.rate_levels
    output = student(images, view=view, heard=nobody, level=level)
    assert view.class_logits is not None
    best = torch.sigmoid(view.logits.float()).max(dim=1)
    answer = student.own_answers(view.class_logits, best.indices)
    row = (layout.columns == best.indices[:, None]).int().argmax(dim=1)
    place = torch.arange(count, device=row.device)
    truth = layout.own(batch.labels)[place, row]
    truth = torch.where(truth < 0, layout.not_mine[row], truth)
    task_level = (-2 * best.values.log2()).round().clamp(0, MAX_LEVEL)
    facts = torch.stack([answer.label, answer.level, truth, task_level.long(), level], dim=1)
    return torch.cat([output.tasks.log_p[place, row].float(), facts.float()], dim=1)


def _calibrate_answers(student: Mantis, fusion: Fusion, known: Tensor) -> None:
    """Fits fusion and tables of the client's answers to rows (N, W + _FACTS) of all workers."""
    log_p, facts = known[:, :-_FACTS], known[:, -_FACTS:].long()
    heard = (facts[:, 0] >= 0) & (facts[:, 3] >= 0)  # the second: no task has a probability of nan
    label, level, truth, task_level, rate_level = facts[heard].T
    shares = shares_of(rate_level, student.spec.num_rates)
    fusion.calibrate(log_p[heard], ClientAnswer(label, level), truth, shares)
    student.answer_counts.copy_(confidence_counts(task_level.numpy(), level.numpy()))


def _most_active(codec: Mantis) -> int:
    """The most tasks in a mask in training, of images of one class: detected, or of one class."""
    members = codec.spec.class_members()
    shared = 1 if members is None else int(members.sum(dim=0).max())
    return max(codec.spec.model.max_active_tasks, shared)
