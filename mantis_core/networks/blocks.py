"""Blocks that client, server and teacher share.

Shapes: B batch, C channels, h w of a feature map, H W of the input, n labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class TaskModules(nn.Module):
    """A module for each task, under the task's name, whatever that name is.

    Names and state dict are those of nn.ModuleDict, which refuses a name that it has as an
    attribute: `train`, `items`, `type` and many more.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        for name, module in (modules or {}).items():
            self[name] = module

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # nn.Module's takes `training` for a task's module

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module  # add_module refuses names that are attributes

    def __getitem__(self, name: str) -> nn.Module:
        module = self._modules[name]
        assert module is not None
        return module

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of each task, in the order in which they were set."""
        return ((name, self[name]) for name in self)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Computes in float32 on the device of `x`, whatever the caller's autocast is.

    The meta device has no autocast to switch off.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def modulate(x: Tensor, gamma_beta: tuple[Tensor, Tensor] | None) -> Tensor:
    """gamma * x + beta on (B, C, h, w), or x."""
    if gamma_beta is None:
        return x
    gamma, beta = gamma_beta
    return gamma * x + beta


def pool(x: Tensor) -> Tensor:
    """Mean and maximum over space, (B, C, h, w) to (B, 2 C)."""
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of about eight channels: no statistics that depend on the batch."""
    groups = next(g for g in (channels // 8 or 1, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; the first may halve the resolution.

    x ─┬─ conv3x3 (stride) ─ norm ─ ReLU ─ conv3x3 ─ norm ─┬─ modulation ─ ReLU ─▶
       └──────────── 1x1 (stride) where shapes differ ─────┘
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = group_norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = group_norm(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor, gamma_beta: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y)) + self.skip(x)
        return torch.relu(modulate(y, gamma_beta))


class SegmentationHead(nn.Module):
    """Logits per pixel from a shallow and a deep feature (after LR-ASPP, Howard et al. 2019)."""

    def __init__(self, shallow: int, deep: int, num_classes: int, *, channels: int = 64) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(shallow, channels, 1)
        self.deep = nn.Conv2d(deep, channels, 1)
        self.mix = nn.Sequential(group_norm(channels), nn.ReLU(), ResidualBlock(channels, channels))
        self.last = nn.Conv2d(channels, num_classes, 1)

    def forward(self, shallow: Tensor, deep: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and (B, C', h', w') to logits (B, n, H, W), `size` being (H, W)."""
        up = interpolate(
            self.deep(deep), size=shallow.shape[2:], mode="bilinear", align_corners=False
        )
        logits = self.last(self.mix(self.shallow(shallow) + up))
        return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
