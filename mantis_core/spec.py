"""What a codec is apart from its weights: sizes, tasks, classes, preprocessing; and its id."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mantis_core.bitstream import MAX_IMAGES, StreamSpec
from mantis_core.config import ModelConfig
from mantis_core.tasks import TaskSpec, class_members

_MAX_AREA_RATIO = 16
"""An input of more than this many times the model's own pixels is refused, coding and decoding."""


class ModelSpec(BaseModel):
    """All that is needed to build a model's modules and read its answers: a checkpoint's config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    tasks: tuple[TaskSpec, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    single_class: bool
    image_size: tuple[int, int]
    short_side: int
    teacher: str
    split: str
    split_shape: tuple[int, int, int]
    last_shape: tuple[int, int, int]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def class_members(self) -> Tensor | None:
        """The classes of each task, bool (K, classes); None where an image may have several."""
        return class_members(self.tasks, len(self.classes)) if self.single_class else None

    def stream_spec(self, model_id: bytes) -> StreamSpec:
        """What a stream of the model with this spec and id must look like."""
        own = math.prod(self.image_size)
        return StreamSpec(
            model_id=model_id,
            num_tasks=len(self.tasks),
            input_shape=self.image_size,
            latent_channels=self.model.encoder.latent_channels,
            stride=self.model.encoder.stride,
            labels=self.answerable(),
            max_pixels=_MAX_AREA_RATIO * own,
            max_total_pixels=MAX_IMAGES * own,
        )

    def answerable(self) -> tuple[int, ...]:
        """Labels of each task where the client names classes, and so may answer itself; else ()."""
        if not self.model.detector.classes:
            return ()
        return tuple(len(task.classes) for task in self.tasks)

    def model_id(self, state: Mapping[str, Tensor]) -> bytes:
        """4 bytes of a SHA-256 over all that a stream and its answer depend on.

        Tasks with their classes in order, preprocessing, what is sent, and every tensor of `state`
        (name, type, shape, bytes): client, tables and server alike, so that models that differ in
        their decoders alone have different ids. Other fields of the config leave the id as it is.
        """
        facts = {
            "tasks": [[t.name, t.kind, t.num_classes, list(t.classes)] for t in self.tasks],
            "image_size": self.image_size,
            "short_side": self.short_side,
            "prior": self.model.prior,
            "send_probabilities": self.model.send_probabilities,
            "stride": self.model.encoder.stride,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()[:4]
