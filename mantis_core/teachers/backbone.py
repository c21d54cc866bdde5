"""A classification network without its classifier, as a row of named blocks.

Shapes: B batch, H W input pixels, C h w channels, height and width of a feature map.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

from mantis_core.errors import ModelError
from mantis_core.networks.lite import SCALES, build_lite
from mantis_core.networks.tiny_maps import fast_on_tiny_maps

_STAGES = "trunk_output"  # of torchvision's RegNets


class Backbone(nn.Module):
    """A classification network as a row of named blocks and one pooled feature.

    x (B, 3, H, W) ─ block ─ ... ─ split ─ ... ─ last block ─▶ (B, C, h, w) ─ pool ─▶ (B, C')
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.names, self.feature_size = _build_net(name)
        fast_on_tiny_maps(self.net)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to the last block's output (B, C, h, w)."""
        for name in self.names:
            x = self.net.get_submodule(name)(x)
        return x

    def features(self, x: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of the `wanted` blocks, and of the last one under "last"."""
        found = {}
        for name in self.names:
            x = self.net.get_submodule(name)(x)
            if name in wanted:
                found[name] = x
        return {**found, "last": x}

    def pool(self, last: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C) by the mean over space."""
        return last.mean(dim=(2, 3))

    def tail_after(self, split: str) -> nn.Sequential:
        """A copy of the blocks behind `split`, under their own names."""
        if split not in self.names[:-1]:
            raise ModelError(
                f"teacher.split is {split!r}; this teacher can be cut after one of: "
                f"{', '.join(self.names[:-1])}"
            )
        tail = nn.Sequential()
        for name in self.names[self.names.index(split) + 1 :]:
            block = copy.deepcopy(self.net.get_submodule(name))
            stages, _, own = name.rpartition(".")
            if stages == _STAGES:  # nested as in the network, for weights saved under these names
                if stages not in dict(tail.named_children()):
                    tail.add_module(stages, nn.Sequential())
                tail.get_submodule(stages).add_module(own, block)
            else:
                tail.add_module(name.replace(".", "_"), block)
        return tail


def build_network(name: str) -> nn.Module:
    """The network of this name with random weights, for ImageNet's classes."""
    require_known(name)
    if name in SCALES:
        return build_lite(name)
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    return net


def require_known(name: str) -> None:
    """Raises ModelError for a name of no network, with those that are like it."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names and name not in SCALES:
        close = " or ".join(difflib.get_close_matches(name, [*names, *SCALES], 3))
        hint = f"did you mean {close}?" if close else "see torchvision.models for their names"
        raise ModelError(f"teacher.name: there is no classification model {name!r}; {hint}")


def _build_net(name: str) -> tuple[nn.Module, tuple[str, ...], int]:
    """The network without its classifier, its blocks' names, and the size of its pooled feature.

    Raises ModelError for a network that is more than these blocks, mean pooling and one linear
    layer: blocks run one after the other must give what the whole network gives.
    """
    net = build_network(name)
    children = dict(net.named_children())
    head = children.get("fc", children.get("classifier", nn.Identity()))
    if isinstance(features := children.get("features"), nn.Sequential):
        names = [f"features.{index}" for index in range(len(features))]
    else:
        names = [name for name in children if name not in ("avgpool", "fc", "classifier")]
        if isinstance(stages := children.get(_STAGES), nn.Sequential):
            names.remove(_STAGES)
            names += [f"{_STAGES}.{name}" for name, _ in stages.named_children()]
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if len(linear) == 1 and len(names) > 1 and _is_row_of_blocks(net, names, linear[0]):
        for name in {"avgpool", "fc", "classifier"} & children.keys():
            setattr(net, name, nn.Identity())
        return net, tuple(names), linear[0].in_features
    raise ModelError(
        f"teacher.name: {name} is not built as blocks, mean pooling and one linear layer; "
        "take a ResNet, ResNeXt, Wide ResNet, RegNet, ShuffleNetV2, MobileNetV2, EfficientNet or "
        "efficientnet_lite0 to 2"
    )


def _is_row_of_blocks(net: nn.Module, names: Sequence[str], head: nn.Linear) -> bool:
    if head.weight.is_meta:  # there are no values to compare
        return True
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    was_training = net.training
    net.eval()
    try:
        with torch.no_grad():
            whole = net(x)
            for name in names:
                x = net.get_submodule(name)(x)
            same = torch.allclose(head(x.mean(dim=(2, 3))), whole, atol=1e-4, rtol=1e-4)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        same = False
    net.train(was_training)
    return same
