"""The client's networks as two ONNX graphs: one looks at an image, one codes what it saw.

They are two so that an image that is coded several times, for other requests or at other rates,
passes stem and detector once; and so that the first, which is nearly all of the work, can be
quantised alone. Shapes: B batch, always 1, K tasks, L rates, H W input pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mantis_core.codec.client_codec import ClientCodec
from mantis_core.networks.client import Client
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.detector import NoDetector, View
from mantis_core.networks.preprocessing import normalise
from mantis_lite.client import (
    ANSWERS,
    CLASSES,
    CONDITION,
    IMAGE,
    LATENT,
    LEVEL,
    PROBABILITIES,
)

_STEM, _MAP = "stem", "detected"
_READ_THE_MAP = ("attention", "features")  # kinds of conditioning


class Look(nn.Module):
    """uint8 images to features and probabilities, as `codec.network.ClientNetwork.see`."""

    def __init__(self, codec: ClientCodec) -> None:
        super().__init__()
        self.client = codec.client
        self.features = features_of(codec)
        self.detects = not isinstance(codec.client.detector, NoDetector)
        self.names_classes = self.detects and codec.client.detector.members is not None
        self.outputs = [
            *self.features,
            *[PROBABILITIES] * self.detects,
            *[CLASSES] * self.names_classes,
        ]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(1, 3, H, W) to the outputs that `outputs` names."""
        view: View = self.client(normalise(image))
        found = [{_STEM: view.stem, _MAP: view.detected}[name] for name in self.features]
        if self.detects:
            found.append(torch.sigmoid(view.logits.float()))
        if self.names_classes:
            assert view.class_logits is not None
            found.append(torch.softmax(view.class_logits.float(), dim=1))
        return tuple(found)


class Code(nn.Module):
    """Features, condition and rate level to a latent, as `codec.network.ClientNetwork.code`."""

    def __init__(self, codec: ClientCodec) -> None:
        super().__init__()
        self.client: Client = codec.client
        self.num_rates = codec.spec.num_rates
        self.features = features_of(codec)
        self.inputs = [*self.features, CONDITION, *[LEVEL] * (self.num_rates > 1)]
        self.outputs = [LATENT, *[ANSWERS] * (self.client.exits is not None)]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What `inputs` names to what `outputs` names."""
        named = dict(zip(self.inputs, given, strict=True))
        condition = named[CONDITION]
        stem = named.get(_STEM, named.get(_MAP))
        assert stem is not None
        view = View(stem, named.get(_MAP, stem), condition)
        shares = None if self.num_rates == 1 else shares_of(named[LEVEL], self.num_rates)
        latent, exits = self.client.code(view, condition, shares)
        if exits is None:
            return (latent,)
        parts = [torch.softmax(logits, dim=1) for logits in exits if logits.shape[1]]
        return latent, torch.cat(parts, dim=1)


def features_of(codec: ClientCodec) -> list[str]:
    """Which features the encoder and its conditioning read."""
    client = codec.client
    reads_map = codec.spec.model.conditioning.kind in _READ_THE_MAP
    detects = not isinstance(client.detector, NoDetector)
    return [
        *[_STEM] * (not client.behind_detector),
        *[_MAP] * (client.behind_detector or (reads_map and detects)),
    ]


def write_graphs(codec: ClientCodec, look_path: Path, code_path: Path) -> None:
    """Writes both graphs of a client, which is on the CPU."""
    look = Look(codec).eval()
    image = torch.zeros(1, 3, *codec.spec.image_size, dtype=torch.uint8)
    write_graph(look, (image,), [IMAGE], look.outputs, look_path)
    write_code(codec, code_path)


def write_code(codec: ClientCodec, path: Path) -> None:
    """Writes the second graph of a client, or of an extension of it."""
    look, code = Look(codec).eval(), Code(codec).eval()
    with torch.no_grad():
        seen = look(torch.zeros(1, 3, *codec.spec.image_size, dtype=torch.uint8))
    condition = torch.ones(1, len(codec.spec.tasks))
    level = torch.zeros(1, dtype=torch.int64)
    given = (*seen[: len(look.features)], condition, *[level] * (code.num_rates > 1))
    write_graph(code, given, code.inputs, code.outputs, path)


def write_graph(
    module: nn.Module,
    given: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
) -> None:
    """Writes a module, traced with what it is `given`, as one file."""
    said = io.StringIO()  # the exporter prints its steps
    with contextlib.redirect_stdout(said), torch.no_grad():
        program: Any = torch.onnx.export(
            module, given, dynamo=True, input_names=list(inputs), output_names=list(outputs)
        )
    _forget_sources(program.model)
    program.save(str(path), external_data=False)


def _forget_sources(model: Any) -> None:
    """Drops the exporter's notes on where in which file each node comes from.

    They hold paths of this machine, and a fifth of the file.
    """
    for each in (model, model.graph):
        each.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
