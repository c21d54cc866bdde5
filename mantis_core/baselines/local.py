"""The baseline that sends no latent: a classifier of the client's own cost, on the device.

Whether a codec is worth its bytes depends on what a device can say by itself. The network has the
multiply-adds of the client, from the same blocks; it is distilled from the same teacher, and sends
its answer as a client does that answers an image itself. Shapes: B batch, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.container import VERSIONS, StreamSpec
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage, Packed, write_stream
from mantis_core.config import LossTerm
from mantis_core.folders import save_folder
from mantis_core.networks.blocks import ResidualBlock, pool
from mantis_core.networks.client import SharedStem
from mantis_core.networks.cost import macs_of, multiply_adds, widest
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.teacher import Teacher
from mantis_core.tasks import Batch, Problem, class_members
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe

LOSSES = {
    "labels": LossTerm(criterion="FlatLabels", weight=0.5),
    "distillation": LossTerm(criterion="TeacherLogits"),
}
"""Those of stage 2's joint decision: cross-entropy, and KL from the teacher."""


class LocalClassifier(nn.Module):
    """Images to class logits.

    x ─ stem ─ residual s2 (width) ─ residual ─ residual s2 (2 width) ─ residual ─ pool ─ linear
    """

    def __init__(self, stem: tuple[int, int], width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = SharedStem(stem)
        self.body = nn.Sequential(
            ResidualBlock(self.stem.channels, width, stride=2),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) to "logits" (B, classes), float32."""
        return {"logits": self.head(pool(self.body(self.stem(images)))).float()}

    def cost(self, image_size: tuple[int, int]) -> dict[str, int]:
        """Parameters, bytes in float16 and multiply-adds for an image of (H, W) pixels."""
        parameters = sum(p.numel() for p in self.parameters())
        return {
            "client_parameters": parameters,
            "client_bytes": 2 * parameters,
            "client_macs": _macs(self, image_size),
        }


class LocalRecipe(Recipe):
    """Trains a local classifier on labels and the teacher's distribution."""

    def __init__(
        self, student: LocalClassifier, teacher: Teacher, image_size: tuple[int, int]
    ) -> None:
        super().__init__(teacher.tasks, LOSSES)
        self.student = student
        self.image_size = image_size
        self.set_teacher(teacher, split=teacher.split, last=teacher.backbone.names[-1])

    def measure(self, batch: Batch, progress: float) -> Measured:
        images = normalise(batch.image)
        student = {"outputs": self.student(images)}
        objective = self.objective(student, self.teach(images), batch)
        return Measured((objective,), label_hits(student["outputs"], self.tasks, batch))

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Writes the weights, and in meta.json what the network costs a device."""
        assert isinstance(student, LocalClassifier)
        cost = student.cost(self.image_size)
        save_folder(folder, student.state_dict(), {"kind": kind}, {**meta, "client": cost})


def local_recipe(model: ModelConfig, teacher: Teacher, problem: Problem, *, seed: int) -> Recipe:
    """The recipe of a classifier of the multiply-adds of the client of `model`.

    `problem` has images of one class each.
    """
    torch.manual_seed(seed)
    return LocalRecipe(local_classifier(model, problem), teacher, problem.image_size)


def local_classifier(model: ModelConfig, problem: Problem) -> LocalClassifier:
    """A classifier with random weights, as wide as the multiply-adds of the client allow."""
    classes, size = len(problem.classes), problem.image_size
    members = class_members(problem.tasks, classes)
    budget = macs_of(model, len(problem.tasks), size, members).client

    def cost(width: int) -> int:
        with torch.device("meta"):
            return _macs(LocalClassifier(model.stem.channels, width, classes), size)

    return LocalClassifier(model.stem.channels, widest(cost, budget), classes)


def answer_stream(index: int, sure: float, num_classes: int, image_size: tuple[int, int]) -> Packed:
    """The stream that carries class `index` with probability `sure`, and its sizes.

    It is the stream of a client with one task of all classes that answers an image itself.
    """
    spec = StreamSpec(
        model_id=bytes(4),
        num_tasks=1,
        input_shape=image_size,
        latent_channels=1,
        stride=8,
        labels=(num_classes,),
        max_pixels=image_size[0] * image_size[1],
        version=VERSIONS[-1],
    )
    nothing: NDArray[np.int32] = np.zeros(spec.latent_shape(image_size), np.int32)
    image = CodedImage(
        TaskField((True,), 0, (quantise_log2(sure),)), nothing, index, has_latent=False
    )
    unused = np.array([[[0, TOTAL // 2, TOTAL]]], np.int32)  # a stream without a latent reads none
    tables = TableSet("shared", unused, np.array([0], np.int32), np.array([2], np.int32))
    return write_stream([image], image_size, tables, spec)


def _macs(network: LocalClassifier, image_size: tuple[int, int]) -> int:
    image = torch.empty(1, 3, *image_size, device=next(network.parameters()).device)
    return multiply_adds(lambda: network(image))
