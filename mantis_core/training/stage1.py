"""Stage 1: a task-agnostic codec in front of the teacher's frozen tail.

Shapes: B batch, K tasks, C channels of a feature, h w its height and width, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.config import Stage1Config
from mantis_core.errors import ModelError
from mantis_core.folders import save_folder
from mantis_core.networks.bottleneck import Bottleneck
from mantis_core.networks.client import Client, latent_size
from mantis_core.networks.cost import with_wide_encoder
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.server import FeatureDecoder
from mantis_core.tasks import Batch, Problem, class_members
from mantis_core.teachers.package import start_from_package
from mantis_core.teachers.teacher import Teacher, freeze
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import (
    DETECTION,
    Measured,
    Recipe,
    check_detection,
    model_in_training,
    rate_weight,
    without_detection,
)


def stage1_recipe(
    config: Stage1Config, model: ModelConfig, teacher: Teacher, problem: Problem, *, seed: int
) -> Recipe:
    """A student with random weights, to be distilled from `teacher`."""
    split_shape, _ = teacher.feature_shapes(problem.image_size)
    split_signed, _ = teacher.signed_features(problem.image_size)
    members = class_members(problem.tasks, len(problem.classes)) if problem.single_class else None
    if model.wide_encoder:
        model = with_wide_encoder(model, len(problem.tasks), problem.image_size, members)
    if model.wide_encoder or model.requests == "asked":
        config = config.model_copy(update={"losses": without_detection(config.losses)})
    torch.manual_seed(seed)
    student = Stage1Student(
        model_in_training(model, config),
        len(problem.tasks),
        image_size=problem.image_size,
        split_shape=split_shape,
        split_signed=split_signed,
        tail=teacher.backbone.tail_after(teacher.split),
        members=members,
    )
    loaded: set[str] = set()
    if config.start == "package":
        parts = {"stem": student.client.stem, "detector.deep": student.client.detector.deep}
        loaded = {f"client.{name}" for name in start_from_package(parts)}
    return Stage1Recipe(student, teacher, config, loaded=loaded)


class Stage1Output(NamedTuple):
    """What a stage-1 student computes of images.

    bits (B,): the estimated size of each latent. task_logits (B, K). class_logits (B, classes + 1),
    None if the detector names tasks alone. split and last (B, C, h, w): the features that are
    rebuilt at the teacher's split and behind its last block.
    """

    bits: Tensor
    task_logits: Tensor
    class_logits: Tensor | None
    split: Tensor
    last: Tensor


class Stage1Student(nn.Module):
    """Task-agnostic codec: client, one shared prior, decoder, and the teacher's frozen tail.

    x ─ stem ─┬─ encoder ─ bottleneck ─ decoder ─▶ split ─ tail (frozen) ─▶ last
              └─ detector ─▶ task logits
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        *,
        image_size: tuple[int, int],
        split_shape: tuple[int, int, int],
        tail: nn.Module,
        split_signed: bool = False,
        members: Tensor | None = None,
    ) -> None:
        """Sizes as `stage1_recipe` finds them; `members` (K, classes) bool as Client takes them."""
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
            latent_size(image_size, config.encoder.stride),
            channels=config.decoder.channels,
            blocks=config.decoder.blocks,
            signed=split_signed,
        )
        self.tail = freeze(tail)

    def forward(self, images: Tensor) -> Stage1Output:
        """Normalised images (B, 3, H, W) to the features the teacher would have of them."""
        view = self.client(images)
        latent = self.client.encode(view, torch.sigmoid(view.logits))
        everyone = torch.ones_like(view.logits, dtype=torch.bool)
        received = self.bottleneck(latent, everyone, view.logits.argmax(dim=1))
        split = self.decoder(received.y_hat)
        return Stage1Output(received.bits, view.logits, view.class_logits, split, self.tail(split))

    def train(self, mode: bool = True) -> Stage1Student:
        """Switches the mode; the tail keeps the teacher's statistics."""
        super().train(mode)
        self.tail.eval()
        return self

    def shipped(self) -> dict[str, Tensor]:
        """The state dict that stage 2 starts from: all that was trained, not the teacher's tail.

        What only detection needs is left out if no loss term has trained it.
        """
        alone = self.client.for_detection_alone()
        left_out = {f"tail.{name}" for name in self.tail.state_dict()}
        if not any(parameter.requires_grad for parameter in alone.parameters()):
            prefix = next(n for n, module in self.named_modules() if module is alone)
            left_out |= {f"{prefix}.{name}" for name in alone.state_dict()}
        return {k: v for k, v in self.state_dict().items() if k not in left_out}


class Stage1Recipe(Recipe):
    """Rate + distillation of the teacher's features: L = sum of terms + rate_weight * bits."""

    def __init__(
        self,
        student: Stage1Student,
        teacher: Teacher,
        config: Stage1Config,
        *,
        loaded: Collection[str] = (),
    ) -> None:
        super().__init__(teacher.tasks, config.losses)
        self.student: Stage1Student = student
        self.loaded = frozenset(loaded)
        self.config = config
        detector, criteria = student.client.detector, {t.criterion for t in config.losses.values()}
        check_detection(config.losses, names_classes=detector.members is not None)
        if not criteria.intersection(DETECTION):
            freeze(student.client.for_detection_alone())  # it would get no gradient
        self.set_teacher(teacher, split=teacher.split, last=teacher.backbone.names[-1])
        paths = [term.student or "" for term in config.losses.values()]
        if not (criteria & {"TeacherLogits", "FlatLabels"} or any(map(_is_rebuilt, paths))):
            raise ModelError(
                f"stage1.losses: none of {', '.join(config.losses)} trains the decoder: keep "
                "TeacherLogits, or a term with student: decoder or tail"
            )

    def measure(self, batch: Batch, progress: float) -> Measured:
        images = normalise(batch.image)
        teacher_io = self.teach(images)
        with self.watch_student() as student_io:
            output: Stage1Output = self.student(images)
        assert self.teacher is not None
        logits = self.teacher.decide(output.split, output.last, (images.shape[2], images.shape[3]))
        student_io["outputs"] = {**output._asdict(), **logits}
        rate = rate_weight(self.config, progress, training=self.training) * output.bits.mean()
        objective = self.objective(student_io, teacher_io, batch, rate)
        sums = {**label_hits(logits, self.tasks, batch), "bits": output.bits.detach().sum()}
        return Measured((objective,), sums)

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Writes what stage 2 starts from, see Stage1Student.shipped."""
        assert isinstance(student, Stage1Student)
        save_folder(folder, student.shipped(), {"kind": kind}, meta)


def _is_rebuilt(path: str) -> bool:
    """Whether a student's module works on what the decoder rebuilds."""
    return path.split(".")[0] in ("decoder", "tail")
