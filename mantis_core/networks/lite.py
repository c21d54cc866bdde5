"""EfficientNet-Lite 0 to 2: whole networks, and the blocks that a client is made of.

Scaling of Tan and Le, ICML 2019, without squeeze-and-excitation and with ReLU6, as in
github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Shapes: B batch, H W input
pixels, C h w of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mantis_core.errors import ModelError
from mantis_core.networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD

CLASSES = 1000
EPS = 1e-3  # of the batch norms
_LEAST = 2.0**-14  # float16 holds no smaller value with all its digits


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
CLIENT = "efficientnet_lite0"  # whose blocks a client is made of
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
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 unless it is linear.

    `folded` has no batch norm: the convolution has a bias instead, see `folded_state`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.pad = SamePad(kernel, stride) if kernel > 1 else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=folded)
        self.norm = nn.Identity() if folded else nn.BatchNorm2d(outputs, eps=EPS, momentum=0.01)

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

    def __init__(self, *, folded: bool = False) -> None:
        super().__init__()
        mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        scale, shift = 255 * deviation / 128, (255 * mean - 127) / 128
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.first = ConvNorm(3, STEM, 3, stride=2, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 32, H / 2, W / 2)."""
        return self.first(x * self.scale + self.shift)  # type: ignore[no-any-return]


class BlockShape(NamedTuple):
    """What one block is built from: channels before and behind it, kernel, stride, expansion."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expand: int


def block_shapes(scale: Scale) -> tuple[BlockShape, ...]:
    """The blocks of a variant, from the stem on."""
    shapes, inputs = [], STEM
    for place, row in enumerate(ROWS):
        at_an_end = place in (0, len(ROWS) - 1)
        outputs = _rounded(row.channels * scale.width)
        for index in range(row.repeats if at_an_end else math.ceil(row.repeats * scale.depth)):
            stride = row.stride if index == 0 else 1
            shapes.append(BlockShape(inputs, outputs, row.kernel, stride, row.expand))
            inputs = outputs
    return tuple(shapes)


class Block(nn.Module):
    """Inverted residual: 1x1 that expands, depthwise, 1x1 that projects; no ReLU at its end."""

    def __init__(self, shape: BlockShape, *, folded: bool = False) -> None:
        super().__init__()
        inputs, outputs, kernel, stride, expand = shape
        inner = inputs * expand
        self.expand = ConvNorm(inputs, inner, 1, folded=folded) if expand > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride=stride, groups=inner, folded=folded)
        self.project = ConvNorm(inner, outputs, 1, linear=True, folded=folded)
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
        shapes = block_shapes(scale)
        for number, shape in enumerate(shapes):
            self.add_module(f"block{number}", Block(shape))
        self.head = ConvNorm(shapes[-1].outputs, HEAD, 1)
        self.classifier = nn.Linear(HEAD, CLASSES)
        self.names = ("stem", *(f"block{index}" for index in range(len(shapes))), "head")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images to logits of ImageNet's 1,000 classes."""
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class LiteStem(nn.Sequential):
    """EfficientNet-Lite0's stem and blocks 0 to 4, (B, 3, H, W) to (B, 40, H/8, W/8).

    Batch norms are folded. Modules have the names that they have in the whole network.
    """

    stride = 8
    blocks = 5

    def __init__(self) -> None:
        super().__init__()
        self.add_module("stem", Stem(folded=True))
        shapes = block_shapes(SCALES[CLIENT])[: self.blocks]
        for number, shape in enumerate(shapes):
            self.add_module(f"block{number}", Block(shape, folded=True))
        self.channels = shapes[-1].outputs


class LiteBlocks(nn.Sequential):
    """EfficientNet-Lite0's blocks behind `LiteStem`, as many as `count`, batch norms folded."""

    def __init__(self, count: int) -> None:
        super().__init__()
        shapes = block_shapes(SCALES[CLIENT])
        first, last = LiteStem.blocks, LiteStem.blocks + count
        if last > len(shapes):
            raise ModelError(
                f"model.detector.blocks: {count}, but EfficientNet-Lite0 has "
                f"{len(shapes) - first} blocks behind those of the stem: set that or less"
            )
        for number, shape in enumerate(shapes[first:last], first):
            self.add_module(f"block{number}", Block(shape, folded=True))
        self.channels = shapes[last - 1].outputs


def build_lite(name: str) -> EfficientNetLite:
    """A network of SCALES with random weights."""
    return EfficientNetLite(SCALES[name])


def folded_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with each batch norm as part of the convolution before it.

    w = w * gamma / sqrt(variance + eps), bias = beta - mean * gamma / sqrt(variance + eps). These
    are the weights of modules that are built `folded`. A channel whose weights are then below
    2**-14, which float16 does not hold, gives its bias alone: the norm has switched it off.
    """
    found = {}
    for name, value in state.items():
        if not name.endswith(".conv.weight"):
            continue
        norm = name.removesuffix("conv.weight") + "norm."
        scale = state[f"{norm}weight"] / (state[f"{norm}running_var"] + EPS).sqrt()
        weight = value * scale[:, None, None, None]
        silent = weight.abs().amax(dim=(1, 2, 3), keepdim=True) < _LEAST
        found[name] = weight.masked_fill(silent, 0.0)
        found[name.removesuffix("weight") + "bias"] = (
            state[f"{norm}bias"] - state[f"{norm}running_mean"] * scale
        )
    return found


def _rounded(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, but no less than nine tenths of it."""
    whole = max(8, int(channels + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * channels else whole
