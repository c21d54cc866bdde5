"""A whole network that knows ImageNet-1k's 1,000 classes: built, loaded, the side of its images.

`teacher.py` cuts such a network and reduces its classifier to the data's classes. Shapes: B batch,
H W input pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torchvision
from torch import Tensor, nn

from mantis_core.config import PACKAGE, PRETRAINED, SHIPPED
from mantis_core.errors import ModelError
from mantis_core.networks.lite import CLASSES, SCALES
from mantis_core.teachers.backbone import build_network, require_known
from mantis_core.teachers.package import package_state
from mantis_core.teachers.teacher import check_shipped, freeze
from mantis_core.teachers.weights import read_weights

SIDE = 224
"""The side in pixels of the images that torchvision's networks are measured on."""
_SHOWN = 3  # tensors in a message


def imagenet_network(
    name: str,
    weights: str | None = None,
    *,
    name_field: str = "teacher.name",
    field: str = "teacher.weights",
) -> nn.Module:
    """The network `name`, frozen: normalised images (B, 3, H, W) to logits (B, 1000).

    The logits are in the order of ImageNet's indices. `weights` are `package`, `pretrained`, which
    torchvision downloads unless they are cached, or a file; None takes what the network is shipped
    with. Raises ModelError for an unknown network, for weights that are not there or are another
    network's, and for a classifier of other classes; the fields are what the message blames.
    """
    try:
        require_known(name)
    except ModelError as error:  # which blames a config's field
        raise ModelError(str(error).replace("teacher.name", name_field)) from None
    word = weights or (PACKAGE if name in SCALES else PRETRAINED)
    if word in SHIPPED:
        check_shipped(name, word, field=field)
    if word == PRETRAINED:
        return freeze(_downloaded(name, field))
    state = package_state(name, field=field) if word == PACKAGE else read_weights(word, field=field)
    net = build_network(name)
    own = net.state_dict()
    if fault := _fault(own, state):
        raise ModelError(
            f"{field}: {word} does not fit {name}, which has a classifier of {CLASSES} classes: "
            f"{fault}. Give weights of {name} for ImageNet's {CLASSES} classes"
        )
    net.load_state_dict(state, strict=False)  # counters of batch norms may lack
    return freeze(net)


def side_of(name: str) -> int:
    """The side in pixels of the images that the network `name` is given."""
    return SCALES[name].side if name in SCALES else SIDE


def _downloaded(name: str, field: str) -> nn.Module:
    try:
        net: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
    except OSError as error:
        raise ModelError(
            f"{field}=pretrained: torchvision could not download {name} ({error}); give a local "
            "file"
        ) from None
    return net


def _fault(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How weights differ from a network's `own`, in names and shapes; "" if they do not."""
    found = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} for {tuple(value.shape)}"
            for k, value in own.items()
            if k in state and state[k].shape != value.shape
        ],
    }
    return "; ".join(f"{what} {', '.join(k[:_SHOWN])}" for what, k in found.items() if k)
