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
from mantis_core.codec.spec import AddedTask, ModelSpec
from mantis_core.device.golden import procedural_image
from mantis_core.errors import ModelError
from mantis_core.rates import levels_of

_LATER = "server.added."
_MODULES = ("task_decoders", "tails")
COMPARED = 16
"""Images by which a codec is compared with the one before."""


def with_tasks(codec: Mantis, added: Sequence[AddedTask]) -> Mantis:
    """A finished codec with modules for more tasks on its server, untrained.

    Raises ModelError for a task that does not fit, such as a second one of the same name.
    """
    return _rebuilt(codec, (*codec.spec.added, *added), codec.state_dict())


def spec_with(spec: ModelSpec, added: Sequence[AddedTask]) -> ModelSpec:
    """A spec with these added tasks in place of its own. ModelError for one that does not fit."""
    try:
        return ModelSpec.model_validate({**dict(spec), "added": tuple(added)})
    except ValidationError as error:
        said = "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
        raise ModelError(f"the task cannot be added: {said}") from None


def without_task(codec: Mantis, name: str) -> Mantis:
    """A codec without one of the tasks that were added. ModelError for another."""
    _require_added(codec.spec, name, "removed")
    kept = tuple(own for own in codec.spec.added if own.task.name != name)
    if children := [own.task.name for own in kept if own.task.parent == name]:
        raise ModelError(f"task {name!r} is the parent of {', '.join(children)}: remove that first")
    state = {k: t for k, t in codec.state_dict().items() if not k.startswith(_prefixes(name))}
    return _rebuilt(codec, kept, state)


def with_renamed(codec: Mantis, old: str, new: str) -> Mantis:
    """A codec one of whose added tasks has another name. ModelError for another or a taken name."""
    _require_added(codec.spec, old, "renamed")
    said = {old: new}
    renamed = tuple(
        AddedTask(
            task=replace(
                own.task,
                name=said.get(own.task.name, own.task.name),
                parent=said.get(own.task.parent, own.task.parent),
            ),
            through=own.through,
        )
        for own in codec.spec.added
    )
    before, after = _prefixes(old), _prefixes(new)
    state = {}
    for key, tensor in codec.state_dict().items():
        for one, other in zip(before, after, strict=True):
            if key.startswith(one):
                key = other + key.removeprefix(one)
        state[key] = tensor
    return _rebuilt(codec, renamed, state)


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
    """`check_unchanged` on `count` images made by a rule, asked for and detected, at each rate."""
    spec = before.spec
    made = [procedural_image(2000 + number, spec.image_size) for number in range(count)]
    images = torch.from_numpy(np.stack(made))
    names = list(spec.task_names)
    requests: list[list[str] | None] = [names, names[:1]]
    if spec.model.requests == "detect":
        requests = [None]
    elif spec.model.requests == "both":
        requests.append(None)
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


def _rebuilt(codec: Mantis, added: tuple[AddedTask, ...], state: Mapping[str, Tensor]) -> Mantis:
    made = Mantis(spec_with(codec.spec, added))
    made.load_state_dict({**made.state_dict(), **state})
    return made.eval()


def _require_added(spec: ModelSpec, name: str, what: str) -> None:
    known = [own.task.name for own in spec.added]
    if name in known:
        return
    if name in spec.task_names:
        raise ModelError(
            f"task {name!r} is one of the client's own, which decide its streams: it cannot be "
            f"{what}, only trained anew"
        )
    raise ModelError(f"no task {name!r} was added; added are {', '.join(known) or 'none'}")


def _prefixes(name: str) -> tuple[str, ...]:
    return tuple(f"{_LATER}{part}.{name}." for part in _MODULES)
