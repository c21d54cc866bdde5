"""The teacher as it runs in another stage's training: frozen, cut, and without batch norms.

Shapes: B batch, C h w of a feature map, H W input pixels.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mantis_core.networks.lite import SamePad
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.teacher import Teacher, freeze


class FrozenTeacher(nn.Module):
    """What a teacher returns to loss terms, with no more computed than they read.

    x ─ block ─ ... ─ deepest block that is read ─▶ outputs of the modules at `paths`, answers

    Its blocks are copies. Each batch norm behind a convolution is folded into it, which changes
    outputs by rounding alone. `answers`: whether logits are read too, for which all blocks run.
    """

    def __init__(self, teacher: Teacher, paths: Collection[str], *, answers: bool) -> None:
        """`paths` are modules of `teacher.backbone.net`, inside its blocks."""
        super().__init__()
        backbone, self.answers, self.split = teacher.backbone, answers, teacher.split
        net = folded(backbone.net, keep=paths)
        self.names = _needed(backbone, paths, answers=answers)
        self.blocks = freeze(nn.ModuleList(net.get_submodule(name) for name in self.names))
        self.watch = Watch({path: net.get_submodule(path) for path in paths})

    def forward(self, images: Tensor, teacher: Teacher) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to an io dict; `teacher` answers from the features.

        The dict has {"output": tensor} for each path and, under "outputs", what `teacher.decide`
        gives; nothing is there if no term reads it.
        """
        x, split = images, images
        with self.watch.on() as io:
            for name, block in zip(self.names, self.blocks, strict=True):  # type: ignore[call-overload]
                x = block(x)
                split = x if name == self.split else split
        size = (images.shape[2], images.shape[3])
        return {**io, "outputs": teacher.decide(split, x, size) if self.answers else {}}


class Watch:
    """What modules return, kept in an io dict while `on` is entered.

    Its hooks are set once: torch.compile cannot trace a step that sets them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.io: dict[str, Any] | None = None
        self.hooks = [
            module.register_forward_hook(partial(self._keep, name))
            for name, module in modules.items()
        ]

    @contextmanager
    def on(self) -> Iterator[dict[str, Any]]:
        """An io dict that comes to hold {"output": ...} under the modules' names."""
        io: dict[str, Any] = {}
        self.io = io
        try:
            yield io
        finally:
            self.io = None

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.io is not None:
            self.io[name] = {"output": output}


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """As `Watch.on`, with hooks that are removed at the end."""
    watch = Watch(modules)
    try:
        with watch.on() as io:
            yield io
    finally:
        for hook in watch.hooks:
            hook.remove()


def folded(net: nn.Module, *, keep: Collection[str] = ()) -> nn.Module:
    """A copy in eval mode whose batch norms are part of the convolutions before them.

    They are identities in the copy. Outputs of modules named in `keep` stay what they were. A
    network that cannot be traced keeps its batch norms.
    """
    net = copy.deepcopy(net).eval()
    for convolution, norm in _pairs(net):
        if convolution not in keep:
            pair: Any = (net.get_submodule(convolution), net.get_submodule(norm))
            fused = fuse_conv_bn_eval(*pair)
            net.set_submodule(convolution, fused)
            net.set_submodule(norm, nn.Identity())
    return net


class _Layers(fx.Tracer):
    """Takes a convolution for one node, whoever wrote its class, and padding by an input's size."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | SamePad) or super().is_leaf_module(module, name)


def _pairs(net: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of each batch norm and of the convolution before it, which nothing else reads."""
    try:
        nodes = list(_Layers().trace(net).nodes)
    except (fx.proxy.TraceError, TypeError):
        return
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or calls[node.target] + calls[before.target] > 2:
            continue
        kinds = net.get_submodule(str(before.target)), net.get_submodule(str(node.target))
        alone = len(before.users) == 1
        if alone and isinstance(kinds[0], nn.Conv2d) and isinstance(kinds[1], nn.BatchNorm2d):
            yield str(before.target), str(node.target)


def _needed(backbone: Backbone, paths: Collection[str], *, answers: bool) -> Sequence[str]:
    """The names of the blocks up to the deepest that is read."""
    if answers:
        return backbone.names
    read = [
        index
        for index, name in enumerate(backbone.names)
        if any(path == name or path.startswith(f"{name}.") for path in paths)
    ]
    return backbone.names[: max(read, default=-1) + 1]
