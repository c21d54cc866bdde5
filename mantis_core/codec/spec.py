"""What a codec is apart from its weights: sizes, tasks, classes, preprocessing; and its id."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from mantis_core.architecture import ModelConfig
from mantis_core.bitstream.container import MAX_IMAGES, VERSIONS, StreamSpec
from mantis_core.device.facts import ClientFacts
from mantis_core.rates import count_levels
from mantis_core.tasks import Problem, TaskSpec, class_members

if TYPE_CHECKING:  # at run time a client needs no torchvision
    from mantis_core.teachers.teacher import Teacher

_MAX_AREA_RATIO = 16
"""Encoder and decoder refuse an input of more than this many times the model's own pixels."""


class Ids(NamedTuple):
    """The 4 bytes that streams carry, and those that name the whole model with its server."""

    stream: bytes
    model: bytes


DECIDES_A_STREAM = ("client.", "bottleneck.table_", "answer_counts")
"""What the names of the tensors begin with that a stream depends on."""


def extension_prefix(number: int) -> str:
    """What the names of an extension's tensors begin with."""
    return f"extensions.{number}."


class AddedTask(BaseModel):
    """A task that the server answers and the client does not know: no stream names it.

    It is answered for images whose stream carries all of the client's tasks `through`; () is any
    stream with a latent. Its labels are its own, no classes of the model. With a `parent` that is
    active too it is answered where the answer to that admits it, as `TaskSpec` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: TaskSpec
    through: tuple[str, ...] = ()


class ExtensionSpec(BaseModel):
    """Tasks that came later and that the client knows: they are asked for, and sent by themselves.

    The client has a row of the conditioning and coding tables for them, and adapters of the
    encoder of this `rank` if that is not 0. Their labels are their own, no classes of the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    rank: int = Field(default=0, ge=0)


class ModelSpec(BaseModel):
    """All it takes to build a model's modules and to read its answers: a checkpoint's config.

    The shapes are those of the teacher's features, at its split and of its last block;
    `split_signed` and `last_signed` say whether these have negative values. `stream_version` is the
    format of the model's streams: 1 for folders of before there was another. `rates` are the rate
    weights that a model of several was trained for, in ascending order; () for a model of one.
    `added` are tasks that came later, on the server alone; `tasks` are those of the client.
    `extensions` are tasks that came later on both, each group with streams of its own.
    """

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
    split_signed: bool = False
    last_signed: bool = False
    stream_version: int = 1
    rates: tuple[float, ...] = ()
    added: tuple[AddedTask, ...] = ()
    extensions: tuple[ExtensionSpec, ...] = ()

    @model_validator(mode="after")
    def _added_to_the_client(self) -> Self:
        known = list(self.task_names)
        for own in self.added:
            if own.task.name in known:
                raise ValueError(f"two tasks are called {own.task.name!r}")
            if lacking := [name for name in own.through if name not in self.task_names]:
                raise ValueError(
                    f"task {own.task.name!r} is answered through {', '.join(lacking)}, and the "
                    f"client has {', '.join(self.task_names)}"
                )
            if own.task.parent and own.task.parent not in known:
                raise ValueError(f"task {own.task.name!r} has no parent {own.task.parent!r}")
            known.append(own.task.name)
        return self

    @model_validator(mode="after")
    def _extended_by_others(self) -> Self:
        if self.extensions and self.stream_version == 1:
            raise ValueError(
                "streams of version 1 name the whole model, which an extension would change: train "
                "the codec again, or add the task with the grade server"
            )
        known = [task.name for task in self.answered]
        for extension in self.extensions:
            own = [task.name for task in extension.tasks]
            if taken := [name for name in own if name in known or own.count(name) > 1]:
                raise ValueError(f"two tasks are called {taken[0]!r}")
            for task in extension.tasks:
                if task.parent and task.parent not in own:
                    raise ValueError(
                        f"task {task.name!r} has its parent {task.parent!r} in another stream: of "
                        "grade row and adapter, tasks have parents that are added with them"
                    )
            known += own
        return self

    @field_validator("stream_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version not in VERSIONS:
            raise ValueError(
                f"streams of version {version} are unknown; this version has {VERSIONS}"
            )
        return version

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def answered(self) -> tuple[TaskSpec, ...]:
        """All tasks that the server answers, those of the client first."""
        return (*self.tasks, *(own.task for own in self.added))

    @property
    def every_task(self) -> tuple[TaskSpec, ...]:
        """All tasks that some stream of the model is answered for."""
        return (*self.answered, *(task for own in self.extensions for task in own.tasks))

    @property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """The tasks whose streams have one id, by name: the client's own, each extension's."""
        named = (tuple(task.name for task in own.tasks) for own in self.extensions)
        return (self.task_names, *named)

    def extended(self, number: int) -> ModelSpec:
        """The spec of the codec that an extension is for its own tasks: it is asked for them."""
        detector = self.model.detector.model_copy(update={"classes": False})
        changed = {"requests": "asked", "prior": "shared", "detector": detector}
        silent = ("send_probabilities", "send_answer", "exit_heads", "single_task")
        model = self.model.model_copy(update=changed | dict.fromkeys(silent, False))
        own = {"model": model, "tasks": self.extensions[number].tasks, "single_class": False}
        nothing = dict.fromkeys(("classes", "class_names", "added", "extensions"), ())
        return self.model_copy(update=own | nothing)

    def class_members(self) -> Tensor | None:
        """The classes of each task, bool (K, classes); None where an image may have several."""
        return class_members(self.tasks, len(self.classes)) if self.single_class else None

    @property
    def num_rates(self) -> int:
        """How many rate weights the model was trained for."""
        return max(1, len(self.rates))

    @property
    def rate_levels(self) -> int:
        """How many rate levels the model has, see `rates.py`."""
        return count_levels(self.num_rates)

    @property
    def sends_answer(self) -> bool:
        """Whether the client sends its own answer beside the latent."""
        own = self.model
        return own.send_answer and own.detector.classes and not (own.wide_encoder or own.per_task)

    @property
    def facts(self) -> ClientFacts:
        """What a client has to know of the model."""
        own = self.model
        return ClientFacts(
            tasks=self.task_names,
            classes=tuple(tuple(task.classes) for task in self.tasks),
            labels=self.answerable(),
            image_size=self.image_size,
            short_side=self.short_side,
            requests=own.requests,
            max_active_tasks=own.max_active_tasks,
            send_probabilities=own.send_probabilities,
            sends_answer=self.sends_answer,
            rate_levels=self.rate_levels,
        )

    def stream_spec(self, stream_id: bytes, confidence: Tensor | None = None) -> StreamSpec:
        """What a stream of a model with this spec and this id must look like.

        `confidence` (17, 8) are the counts of the levels of confidence, where answers are sent.
        """
        own = math.prod(self.image_size)
        return StreamSpec(
            model_id=stream_id,
            num_tasks=len(self.tasks),
            input_shape=self.image_size,
            latent_channels=self.model.encoder.latent_channels,
            stride=self.model.encoder.stride,
            labels=self.answerable(),
            max_pixels=_MAX_AREA_RATIO * own,
            max_total_pixels=MAX_IMAGES * own,
            version=self.stream_version,
            rate_levels=self.rate_levels,
            confidence=()
            if confidence is None
            else tuple(tuple(row) for row in confidence.tolist()),
        )

    def exit_labels(self) -> tuple[int, ...]:
        """How many labels each exit head of the client has, 0 for none; () without any head."""
        if not self.model.exit_heads:
            return ()
        return tuple(task.num_classes * task.is_classification for task in self.tasks)

    def answerable(self) -> tuple[int, ...]:
        """How many labels each task has if the client may answer itself; else ().

        It may where its detector names classes, or where it has exit heads.
        """
        if self.model.exit_heads:
            return self.exit_labels()
        if not self.model.detector.classes:
            return ()
        return tuple(len(task.classes) for task in self.tasks)

    def model_id(self, state: Mapping[str, Tensor]) -> bytes:
        """The first 4 bytes of a SHA-256 over all that a stream and its answer depend on.

        These are the tasks with their classes in order, the preprocessing, what is sent, and every
        tensor of `state` (name, type, shape, bytes). The tensors are those of client, tables and
        server: models that differ in their decoders alone have different ids. Other fields of the
        config do not change the id.
        """
        parents = {t.name: t.parent for t in self.tasks if t.parent}
        labels = {t.name: list(t.labels) for t in self.tasks if t.name in parents.values()}
        more: dict[str, object] = {"parents": [parents, labels]} if parents else {}
        if self.added:
            more["added"] = [own.model_dump(mode="json") for own in self.added]
        if self.extensions:
            more["extensions"] = [own.model_dump(mode="json") for own in self.extensions]
        return self._digest(state, more)[:4]

    def stream_id(self, state: Mapping[str, Tensor]) -> bytes:
        """The id that streams carry: in version 1 the model's.

        From version 2 on it covers the client's weights and the coding tables alone, with the same
        facts. A server may then be trained anew, and still read the streams of clients that are at
        work.
        """
        if self.stream_version == 1:
            return self.model_id(state)
        return self.stream_digest(state)[:4]

    def stream_digest(self, state: Mapping[str, Tensor]) -> bytes:
        """The whole SHA-256 of what the client's own streams depend on, from version 2 on."""
        own = {name: t for name, t in state.items() if name.startswith(DECIDES_A_STREAM)}
        return self._digest(own)

    def extension_id(self, state: Mapping[str, Tensor], number: int) -> bytes:
        """The id that the streams of an extension carry, by the same rule."""
        return self.extension_digest(state, number)[:4]

    def extension_digest(self, state: Mapping[str, Tensor], number: int) -> bytes:
        """The whole SHA-256 of what the streams of an extension depend on.

        The tensors are the client's, as for the codec's own streams, and those of the extension
        that decide its latents and how they are coded.
        """
        own = extension_prefix(number)
        kept = {name: t for name, t in state.items() if name.startswith("client.")}
        for name, tensor in state.items():
            if name.startswith(own) and name.removeprefix(own).startswith(DECIDES_A_STREAM):
                kept["own." + name.removeprefix(own)] = tensor
        return self.extended(number)._digest(kept)

    def _digest(self, state: Mapping[str, Tensor], more: Mapping[str, object] = {}) -> bytes:
        facts: dict[str, object] = {
            "tasks": [[t.name, t.kind, t.num_classes, list(t.classes)] for t in self.tasks],
            "image_size": self.image_size,
            "short_side": self.short_side,
            "prior": self.model.prior,
            "send_probabilities": self.model.send_probabilities,
            "stride": self.model.encoder.stride,
        }
        if self.stream_version > 1:
            facts |= {"version": self.stream_version, "send_answer": self.sends_answer}
        if self.rates:
            facts["rate_levels"] = self.rate_levels
        if self.model.requests != "both":
            facts["requests"] = self.model.requests
        facts |= more
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()


def model_spec(
    model: ModelConfig, teacher: Teacher, problem: Problem, rates: tuple[float, ...] = ()
) -> ModelSpec:
    """The spec of the codec for these sections, of several `rates` or of one."""
    split_shape, last_shape = teacher.feature_shapes(problem.image_size)
    split_signed, last_signed = teacher.signed_features(problem.image_size)
    return ModelSpec(
        model=model,
        tasks=problem.tasks,
        classes=problem.classes,
        class_names=problem.class_names,
        single_class=problem.single_class,
        image_size=problem.image_size,
        short_side=problem.short_side,
        teacher=teacher.name,
        split=teacher.split,
        split_shape=split_shape,
        last_shape=last_shape,
        split_signed=split_signed,
        last_signed=last_signed,
        stream_version=VERSIONS[-1],
        rates=rates,
    )
