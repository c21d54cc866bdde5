"""A teacher's weights in a file: read, unwrapped, and put in the order of the data's classes.

`teacher.py` says which names and shapes its network needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mantis_core.config import SHIPPED, SORTED
from mantis_core.errors import ModelError
from mantis_core.teachers.package import named_as_here

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""What the name of a file of weights may end in. All but the first are read by torch."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def read_weights(path: str | Path, *, field: str = "teacher.weights") -> dict[str, Tensor]:
    """The float32 state dict in a file, under the network's own names. Nothing is unpickled.

    A state dict under "state_dict", "model_state_dict" or "model" is taken out of its checkpoint.
    The prefixes that DistributedDataParallel, Lightning and torch.compile write are taken off, and
    an EfficientNet-Lite's published names become ours.
    Raises ModelError for another kind of file; `field` is what the message blames.
    """
    path = Path(path)
    if not path.is_file():
        ways = f"give {', '.join(SHIPPED)} or a file"
        if field == "teacher.weights":
            ways = f"give train, {', '.join(SHIPPED)} or a file"
        raise ModelError(f"{field}: no file {path}; {ways}")
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{field}: {path} is damaged: {error}") from None
    elif path.suffix in SUFFIXES:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = [*str(error).splitlines(), type(error).__name__][0]
            raise ModelError(
                f"{field}: {path} is not a plain state dict ({reason}). Write a file of the "
                "network's weights alone: torch.save(network.state_dict(), FILE)"
            ) from None
    else:
        raise ModelError(
            f"{field}: {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    named = _unwrapped(state)
    if named is None:
        raise ModelError(
            f"{field}: {path} holds more than named tensors, and no state dict under "
            f"{', '.join(_WRAPPERS)}: {_shown(state)}"
        )
    floats = {
        name: value.float() if value.is_floating_point() else value
        for name, value in _without_prefixes(named).items()
    }
    return named_as_here(floats)


def read_order(order: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes of a file's logits, in order: those in the text file `order`, one a line.

    `sorted` instead of a file stands for the data's class ids in alphabetical order. Raises
    ModelError for a file that is missing, empty or names a class twice.
    """
    if str(order) == SORTED:
        return tuple(sorted(classes))
    path = Path(order)
    if not path.is_file():
        raise ModelError(
            f"teacher.classes: no file {path}; give a text file with the class of each logit on a "
            f"line of its own, or `{SORTED}`"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ModelError(f"teacher.classes: {path} is no text in UTF-8") from None
    names = tuple(line.strip() for line in lines if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        found = f"names {twice[0]!r} twice" if twice else "is empty"
        raise ModelError(f"teacher.classes: {path} {found}; it must name the class of each logit")
    return names


def head_rows(
    logits: int,
    classes: Sequence[str],
    *,
    class_names: Sequence[str] = (),
    imagenet_indices: Sequence[int] | None = None,
    order: Sequence[str] | None = None,
    source: str = "pretrained",
) -> list[int]:
    """Which of a head's `logits` answers each of the data's `classes` (class ids).

    `order` names the class of each logit, by class id or by the class's name in `class_names`.
    Without it, 1,000 logits are ImageNet-1k's, of which `imagenet_indices` are the data's classes;
    another number must be that of the classes, which are taken in their order. ModelError where
    that does not fit; `source` is the file that the message blames.
    """
    if order is not None:
        if len(order) != logits:
            raise ModelError(
                f"teacher.classes names {len(order)} classes, {source} has {logits} logits: name "
                "the class of each logit on a line of its own, also of those that you do not use"
            )
        place = {name: index for index, name in enumerate(order)}
        names = class_names if class_names and not set(classes) <= set(place) else classes
        missing = [name for name in names if name not in place]
        if missing:
            raise ModelError(
                f"teacher.classes lacks {_some(missing)}; it names {_some(order)}. The data's "
                f"classes are {_some(classes)}"
            )
        return [place[name] for name in names]
    if logits == 1000 and imagenet_indices is not None:
        return list(imagenet_indices)
    if logits != len(classes):
        raise ModelError(
            f"teacher.weights: {source} has {logits} logits, the data has {len(classes)} classes. "
            "Name the class of each logit in teacher.classes, or train a classifier for your "
            "classes: teacher.weights=train, with teacher.start to begin with these weights. "
            "1000 logits are taken for ImageNet-1k's where every class is a WordNet id of it"
        )
    return list(range(logits))


def _unwrapped(state: Any) -> dict[str, Tensor] | None:
    """The state dict in what a file holds, None if there is none."""
    if not isinstance(state, Mapping):
        return None
    for each in (state, *(state.get(key) for key in _WRAPPERS)):
        if isinstance(each, Mapping) and each and all(isinstance(v, Tensor) for v in each.values()):
            return dict(each)
    return None


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under shorter names, where all names begin with one of the prefixes."""
    state = {name: value for name, value in state.items() if name != "n_averaged"}  # of an average
    while state:
        found = [p for p in _PREFIXES if all(name.startswith(p) for name in state)]
        if not found:
            break
        state = {name.removeprefix(found[0]): value for name, value in state.items()}
    return state


def _shown(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"it is a {type(state).__name__}"
    return f"at its top are {_some([str(name) for name in state])}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
