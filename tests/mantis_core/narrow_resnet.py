"""A teacher of a few thousand parameters: a ResNet of one narrow block a stage.

It is among torchvision's networks of this process alone: a model folder of it loads in no other.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock

WIDTHS = (8, 16, 16, 32)
NAME = "narrow_resnet"


class NarrowResNet(nn.Module):
    """The stages and names of a resnet18, with one block a stage and WIDTHS channels."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], 1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], 2)
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(before: int, channels: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(
        nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )
    return nn.Sequential(BasicBlock(before, channels, stride, shortcut))


def _narrow_resnet(weights: None = None, **options: int) -> NarrowResNet:
    return NarrowResNet(**options)


_narrow_resnet.__module__ = "torchvision.models.resnet"  # where torchvision lists its own
register_model(NAME)(_narrow_resnet)
