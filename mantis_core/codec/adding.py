"""A trained codec with other tasks on its server: one more, one less, one by another name.

The client, its streams and the answers to its own tasks stay what they were, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from mantis_core.codec.answer import Answer
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask, ExtensionSpec, ModelSpec, extension_prefix
from mantis_core.device.golden import procedural_image
from mantis_core.errors import ModelError
from mantis_core.networks.conditioning import READ_BY_TASK
from mantis_core.networks.extension import density_row
from mantis_core.rates import levels_of
from mantis_core.tasks import TaskSpec

_LATER = "server.added."
_MODULES = ("task_decoders", "tails")
COMPARED = 16
"""Images by which a codec is compared with the one before."""


def with_tasks(codec: Mantis, added: Sequence[AddedTask]) -> Mantis:
    """A finished codec with modules for more tasks on its server, untrained.

    Raises ModelError for a task that does not fit, such as a second one of the same name.
    """
    return _rebuilt(codec, {"added": (*codec.spec.added, *added)}, codec.state_dict())


def with_extension(
    codec: Mantis, tasks: Sequence[TaskSpec], *, rank: int = 0, through: Sequence[str] = ()
) -> Mantis:
    """A finished codec with an extension for more tasks, untrained: it has no tables yet.

    It starts from what the client does when it is asked for its tasks `through`, () being all.
    With `rank` it has adapters. Raises ModelError for a task that does not fit, and for a client
    that does not read its tasks where no adapters are wanted either.
    """
    spec = codec.spec
    extensions = check_extension(spec, tasks, rank=rank, through=through)
    made = _rebuilt(codec, {"extensions": extensions}, codec.state_dict())
    own = made.extension(len(extensions) - 1)
    places = [spec.task_names.index(name) for name in through or spec.task_names]
    own.client.start(made.client, places, together=spec.model.requests != "detect")
    row = density_row(spec.model.prior, len(spec.tasks), places)
    own.start_density(made.bottleneck, row)
    return made


def check_extension(
    spec: ModelSpec, tasks: Sequence[TaskSpec], *, rank: int, through: Sequence[str]
) -> tuple[ExtensionSpec, ...]:
    """The extensions of a codec with one more, see `with_extension`.

    Raises ModelError where that does not fit.
    """
    if not rank and not READ_BY_TASK[spec.model.conditioning.kind]:
        raise ModelError(
            f"model.conditioning.kind is {spec.model.conditioning.kind}: this client reads no "
            "task, so that it has no row for another one; use the grade adapter or server"
        )
    if unknown := [name for name in through if name not in spec.task_names]:
        raise ModelError(
            f"extend.through names {', '.join(unknown)}, and the client has "
            f"{', '.join(spec.task_names)}"
        )
    extensions = (*spec.extensions, ExtensionSpec(tasks=tuple(tasks), rank=rank))
    spec_with(spec, extensions=extensions)
    return extensions


def spec_with(spec: ModelSpec, **changed: Sequence[AddedTask | ExtensionSpec]) -> ModelSpec:
    """A spec with `added` or `extensions` in place of its own.

    Raises ModelError for a task that does not fit.
    """
    try:
        return ModelSpec.model_validate({**dict(spec), **changed})
    except ValidationError as error:
        said = "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
        raise ModelError(f"the task cannot be added: {said}") from None


def without_task(codec: Mantis, name: str) -> Mantis:
    """A codec without one of the tasks that were added. ModelError for another.

    Streams of an extension that has tasks left get another id: its clients need its new patch.
    """
    number = _place(codec.spec, name, "removed")
    tasks = [own.task for own in codec.spec.added]
    if number is not None:
        tasks = list(codec.spec.extensions[number].tasks)
    if children := [task.name for task in tasks if task.parent == name]:
        raise ModelError(f"task {name!r} is the parent of {', '.join(children)}: remove that first")
    gone = _prefixes(number, name)
    state = {k: t for k, t in codec.state_dict().items() if not k.startswith(gone)}
    if number is None:
        kept = tuple(own for own in codec.spec.added if own.task.name != name)
        return _rebuilt(codec, {"added": kept}, state)
    extensions = list(codec.spec.extensions)
    if left := tuple(task for task in tasks if task.name != name):
        extensions[number] = extensions[number].model_copy(update={"tasks": left})
        return _rebuilt(codec, {"extensions": extensions}, state)
    del extensions[number]
    moved = {}
    for key, tensor in state.items():
        if key.startswith("extensions."):
            _, place, rest = key.split(".", 2)
            if int(place) == number:
                continue
            key = extension_prefix(int(place) - (int(place) > number)) + rest
        moved[key] = tensor
    return _rebuilt(codec, {"extensions": extensions}, moved)


def with_renamed(codec: Mantis, old: str, new: str) -> Mantis:
    """A codec one of whose added tasks has another name. ModelError for another or a taken name.

    Streams of an extension get another id with it: its clients need its new patch.
    """
    number = _place(codec.spec, old, "renamed")
    said = {old: new}

    def named(task: TaskSpec) -> TaskSpec:
        name, parent = said.get(task.name, task.name), said.get(task.parent, task.parent)
        return replace(task, name=name, parent=parent)

    added = [AddedTask(task=named(own.task), through=own.through) for own in codec.spec.added]
    extensions = [
        own.model_copy(update={"tasks": tuple(map(named, own.tasks))})
        for own in codec.spec.extensions
    ]
    before, after = _prefixes(number, old), _prefixes(number, new)
    state = {}
    for key, tensor in codec.state_dict().items():
        for one, other in zip(before, after, strict=True):
            if key.startswith(one):
                key = other + key.removeprefix(one)
        state[key] = tensor
    return _rebuilt(codec, {"added": added, "extensions": extensions}, state)


def check_unchanged(before: Mantis, after: Mantis, images: Tensor, **way: Any) -> None:
    """ModelError unless both send the same streams of `images` and answer their tasks alike.

    `images` (B, 3, H, W) uint8; `way` are arguments of `Mantis.encode`. Answers are compared to the
    bit, for the tasks that `before` has.
    """
    streams = before.encode(images, **way)
    if after.encode(images, **way) != streams:
        raise ModelError("the streams of the client have changed: its weights or tables are others")
    for one, other in zip(before.decode(streams), after.decode(streams), strict=True):
        if difference := _difference(one, other):
            raise ModelError(f"answers to tasks of before have changed: {difference}")


def check_same_codec(before: Mantis, after: Mantis, count: int = COMPARED) -> None:
    """`check_unchanged` on `count` images made by a rule, asked for and detected, at each rate.

    The tasks of extensions that `before` has are asked for too.
    """
    spec = before.spec
    made = [procedural_image(2000 + number, spec.image_size) for number in range(count)]
    images = torch.from_numpy(np.stack(made))
    names = list(spec.task_names)
    requests: list[list[str] | None] = [names, names[:1]]
    if spec.model.requests == "detect":
        requests = [None]
    elif spec.model.requests == "both":
        requests.append(None)
    requests += [[task.name for task in own.tasks] for own in spec.extensions]
    for level in levels_of(spec.rates) or (0,):
        for request in requests:
            check_unchanged(before, after, images, tasks=request, level=level)


def _difference(one: Answer, other: Answer) -> str:
    """In what another model's answer to the tasks of `one` differs; "" if it does not."""
    own, theirs = one.to_dict(), other.to_dict()
    for name, value in own.items():
        if name == "model_id":
            continue
        found = theirs[name]
        if isinstance(value, Mapping):
            found = {key: found.get(key) for key in value}
        elif name == "tasks":
            found = [task for task in found if task in value]
        if json.dumps(found) != json.dumps(value):
            return f"{name} was {value} and is {found}"
    for name, mask in one.segmentation.items():
        if (mask != other.segmentation[name]).any():
            return f"the mask of {name}"
    return ""


def _rebuilt(
    codec: Mantis,
    changed: Mapping[str, Sequence[AddedTask | ExtensionSpec]],
    state: Mapping[str, Tensor],
) -> Mantis:
    made = Mantis(spec_with(codec.spec, **changed))
    made.load_state_dict({**made.state_dict(), **state})
    return made.eval()


def _place(spec: ModelSpec, name: str, what: str) -> int | None:
    """The extension that an added task belongs to, None for a task of the server alone."""
    if name in [own.task.name for own in spec.added]:
        return None
    for number, own in enumerate(spec.extensions):
        if name in [task.name for task in own.tasks]:
            return number
    if name in spec.task_names:
        raise ModelError(
            f"task {name!r} is one of the client's own, which decide its streams: it cannot be "
            f"{what}, only trained anew"
        )
    known = [task.name for task in spec.every_task if task.name not in spec.task_names]
    raise ModelError(f"no task {name!r} was added; added are {', '.join(known) or 'none'}")


def _prefixes(number: int | None, name: str) -> tuple[str, ...]:
    """What the names of a task's own tensors begin with."""
    before = _LATER if number is None else f"{extension_prefix(number)}server."
    return tuple(f"{before}{part}.{name}." for part in _MODULES)
