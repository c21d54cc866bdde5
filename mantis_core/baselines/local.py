"""The baseline that sends no latent: a classifier of the client's own cost, on the device.

Whether a codec is worth its bytes depends on what a device can say by itself. The network has the
multiply-adds of the client, from the same blocks; it is distilled from the same teacher, and sends
its answer as a client does that answers an image itself. Where the server asks, it has a head for
each task, and sends the answer to what is asked. Shapes: B batch, H W input pixels, n labels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.bitstream.coder import TOTAL, TableSet
from mantis_core.bitstream.container import OVERHEAD_BYTES, VERSIONS, StreamSpec
from mantis_core.bitstream.session import CHECKSUM_BYTES, Session
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage, write_message, write_stream
from mantis_core.config import LossTerm
from mantis_core.errors import ModelError
from mantis_core.folders import save_folder
from mantis_core.networks.blocks import ResidualBlock, SegmentationHead, TaskModules, pool
from mantis_core.networks.client import stem_of
from mantis_core.networks.cost import macs_of, multiply_adds, widest
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem, class_members
from mantis_core.teachers.package import start_from_package
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe

LOSSES = {
    "labels": LossTerm(criterion="FlatLabels", weight=0.5),
    "distillation": LossTerm(criterion="TeacherLogits"),
}
"""Those of stage 2's joint decision: cross-entropy, and KL from the teacher."""


class LocalClassifier(nn.Module):
    """Images to logits: of all classes, or of each task where an image has several questions.

    x ─ stem ─ residual s2 (width) ─ residual ─┬─ residual s2 (2 width) ─ residual ─┬─ pool ─ linear
                                               └───────── segmentation head ────────┘

    The stem is the client's.
    """

    def __init__(
        self, model: ModelConfig, width: int, problem: Problem, *, asked: bool = False
    ) -> None:
        """`asked`: the server asks for a task, instead of the class of an image."""
        super().__init__()
        self.asked = asked
        self.stem = stem_of(model)
        self.body = nn.Sequential(
            ResidualBlock(self.stem.channels, width, stride=2),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.head = nn.Linear(4 * width, len(problem.classes)) if problem.single_class else None
        heads = {}
        for task in () if problem.single_class else problem.tasks:
            heads[task.name] = (
                nn.Linear(4 * width, task.num_classes)
                if task.is_classification
                else SegmentationHead(width, 2 * width, task.num_classes, channels=width)
            )
        self.heads = TaskModules(heads)

    def forward(self, images: Tensor, *, coarse: bool = False) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) to "logits" (B, classes), float32, or "logits/<task>".

        The latter are (B, n), or (B, n, H, W) of a segmentation; `coarse` leaves those at an eighth
        of the image's sides.
        """
        shallow = self.body[:2](self.stem(images))
        deep = self.body[2:](shallow)
        pooled = pool(deep)
        if self.head is not None:
            return {"logits": self.head(pooled).float()}
        height, width = (shallow if coarse else images).shape[2:]
        return {
            f"logits/{name}": head(shallow, deep, (height, width))
            if isinstance(head, SegmentationHead)
            else head(pooled).float()
            for name, head in self.heads.items()
        }

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
        self,
        student: LocalClassifier,
        teacher: Teacher,
        image_size: tuple[int, int],
        *,
        loaded: Collection[str] = (),
    ) -> None:
        super().__init__(teacher.tasks, LOSSES)
        self.student, self.loaded = student, frozenset(loaded)
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


def local_recipe(
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    *,
    seed: int,
    start: Literal["random", "package"] = "random",
) -> Recipe:
    """The recipe of a classifier of the multiply-adds of the client of `model`.

    Its stem begins with the weights that the client's begins with: `start` is `stage1.start`.
    Raises ModelError for images of several questions where nobody says which is to be answered.
    """
    if problem.single_class and not all(task.is_classification for task in problem.tasks):
        raise ModelError(
            "the baseline `local` names the class of an image, and this data has a segmentation "
            "beside it: set data.single_class=false, or leave out `local`"
        )
    torch.manual_seed(seed)
    classifier = local_classifier(model, problem)
    if not problem.single_class and not classifier.asked:
        raise ModelError(
            "the baseline `local` names the class of an image, and the images of this data have "
            "several labels: set model.requests=asked, or leave out `local`"
        )
    loaded = start_from_package({"stem": classifier.stem}) if start == "package" else ()
    return LocalRecipe(classifier, teacher, problem.image_size, loaded=loaded)


def local_classifier(model: ModelConfig, problem: Problem) -> LocalClassifier:
    """A classifier with random weights, as wide as the multiply-adds of the client allow."""
    size = problem.image_size
    members = class_members(problem.tasks, len(problem.classes))
    labels = [t.num_classes * t.is_classification for t in problem.tasks if model.exit_heads]
    budget = macs_of(model, len(problem.tasks), size, members, labels).client

    def cost(width: int) -> int:
        with torch.device("meta"):
            return _macs(LocalClassifier(model, width, problem), size)

    width, asked = widest(cost, budget), model.requests == "asked"
    return LocalClassifier(model, width, problem, asked=asked)


class Sizes(NamedTuple):
    """What an answer takes: as a stream of its own, without all that is beside it, in a session."""

    wire_bytes: int
    payload_bytes: float
    session_bytes: int


def label_sizes(
    label: int,
    task: int,
    labels: Sequence[int],
    image_size: tuple[int, int],
    *,
    sure: float | None = None,
) -> Sizes:
    """What it takes to send a label of task number `task`; `labels` (K,) are the tasks' numbers.

    It is the stream of a client that answers an image itself, with its probability `sure`. None is
    a client that was asked: in a session its reply names no task.
    """
    spec = StreamSpec(
        model_id=bytes(4),
        num_tasks=len(labels),
        input_shape=image_size,
        latent_channels=1,
        stride=8,
        labels=tuple(labels),
        max_pixels=image_size[0] * image_size[1],
        version=VERSIONS[-1],
    )
    nothing: NDArray[np.int32] = np.zeros(spec.latent_shape(image_size), np.int32)
    levels = None if sure is None else (quantise_log2(sure),)
    field = TaskField(tuple(k == task for k in range(len(labels))), task, levels)
    image = CodedImage(field, nothing, label, has_latent=False)
    unused = np.array([[[0, TOTAL // 2, TOTAL]]], np.int32)  # a stream without a latent reads none
    tables = TableSet("shared", unused, np.array([0], np.int32), np.array([2], np.int32))
    packed = write_stream([image], image_size, tables, spec)
    reply = packed.session_bytes
    if sure is None:
        reply = write_message(image, Session(image_size, requests=True), b"", tables, spec)[2]
    return Sizes(len(packed.data), math.log2(labels[task]) / 8, reply)


def mask_sizes(labels: NDArray[Any]) -> Sizes:
    """What it takes to send a map of labels (h, w): deflated, with the overhead of a stream."""
    deflate = zlib.compressobj(9, wbits=-15)
    size = len(deflate.compress(labels.astype(np.uint8).tobytes()) + deflate.flush())
    return Sizes(size + OVERHEAD_BYTES, float(size), size + CHECKSUM_BYTES)


def _macs(network: LocalClassifier, image_size: tuple[int, int]) -> int:
    image = torch.empty(1, 3, *image_size, device=next(network.parameters()).device)
    return multiply_adds(lambda: network(image))
