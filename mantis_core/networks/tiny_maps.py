"""A 3x3 convolution that is fast on maps of at most 2x2 positions, where a CPU's kernels are slow.

Deep blocks of a teacher have such maps for small images: 2x2 at 64 pixels, 1x1 at 32. Each position
then sees every other, so the convolution is one matrix product over all positions and channels. It
does less than half of the multiply-adds, the rest being products with padding, and oneDNN's
gradient of the weights takes many times as long as they would explain. Results differ by rounding.

Shapes: B batch, C input and O output channels, h w of a map, P = h w positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_SIDE = 2
LEAST_BATCH = 16
"""Images from which on it pays to lay out the weights for all pairs of positions."""


class TinyMapConv2d(nn.Conv2d):
    """A 3x3 convolution of stride and padding 1; `fast_on_tiny_maps` makes them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, O, h, w)."""
        tiny = max(x.shape[2:]) <= MOST_SIDE and len(x) >= LEAST_BATCH
        if not (tiny and x.device.type == "cpu"):
            return super().forward(x)
        batch, channels, height, width = x.shape
        outputs, positions = self.out_channels, height * width
        taps = self.weight.permute(0, 2, 3, 1).reshape(outputs, -1, channels)  # (O, 9, C)
        pairs = taps.index_select(1, _taps_between(height, width))  # (O, P * P, C)
        weight = pairs.view(outputs * positions, positions * channels)
        bias = None if self.bias is None else self.bias.repeat_interleave(positions)
        y = linear(x.permute(0, 2, 3, 1).reshape(batch, -1), weight, bias)
        return y.view(batch, outputs, height, width)


def fast_on_tiny_maps(net: nn.Module) -> nn.Module:
    """Gives the 3x3 convolutions of `net` their fast way; returns `net`, whose weights stay."""
    for module in net.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = TinyMapConv2d
    return net


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether a convolution is 3x3, of stride, padding and dilation 1, with zeros around it."""
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (
        sizes == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


@lru_cache
def _taps_between(height: int, width: int) -> Tensor:
    """For each output position and each input position the tap of the 3x3 kernel between them.

    (P * P,) int64. No two positions of such a map are further apart than one step.
    """
    places = [(row, column) for row in range(height) for column in range(width)]
    return torch.tensor(
        [
            3 * (there[0] - here[0] + 1) + there[1] - here[1] + 1
            for here in places
            for there in places
        ],
        device="cpu",
    )
