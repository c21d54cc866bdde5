"""The networks of a codec's halves for a spec, untrained. Loads no weights.

What it builds it imports: a client needs no torchvision, neither half needs compressai.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mantis_core.codec.spec import ModelSpec
from mantis_core.networks.client import Client, latent_size
from mantis_core.networks.extension import ClientExtension, Extension

if TYPE_CHECKING:
    from mantis_core.networks.bottleneck import Bottleneck
    from mantis_core.networks.server import AnswersLater, JointDecision, Server


def new_client(spec: ModelSpec) -> Client:
    """The client's networks."""
    return Client(
        spec.model,
        len(spec.tasks),
        spec.class_members(),
        num_rates=spec.num_rates,
        labels=spec.exit_labels(),
    )


def new_bottleneck(spec: ModelSpec) -> Bottleneck:
    """The density, without tables."""
    from mantis_core.networks.bottleneck import Bottleneck

    model = spec.model
    return Bottleneck(
        model.encoder.latent_channels,
        len(spec.tasks),
        model.prior,
        quantizer=model.quantizer,
        neighbour_contexts=model.neighbour_contexts,
        num_rates=spec.num_rates,
    )


def new_server(spec: ModelSpec, trunk: nn.Module | None = None) -> Server:
    """The server's networks; without `trunk` the teacher's blocks."""
    from mantis_core.networks.server import Server
    from mantis_core.teachers.backbone import Backbone

    return Server(
        spec.model.decoder,
        spec.tasks,
        latent_channels=spec.model.encoder.latent_channels,
        latent_size=latent_size(spec.image_size, spec.model.encoder.stride),
        split_shape=spec.split_shape,
        last_shape=spec.last_shape,
        split_signed=spec.split_signed,
        last_signed=spec.last_signed,
        num_rates=spec.num_rates,
        added=[own.task for own in spec.added],
        trunk=Backbone(spec.teacher).tail_after(spec.split) if trunk is None else trunk,
    )


def new_joint(spec: ModelSpec) -> JointDecision | None:
    """The joint decision, where each image has one class."""
    from mantis_core.networks.server import JointDecision

    return JointDecision(spec.tasks, len(spec.classes)) if spec.single_class else None


def new_answers(spec: ModelSpec) -> AnswersLater:
    """Decoders and tails of the tasks of an extension, whose spec this is."""
    from mantis_core.networks.server import AnswersLater

    return AnswersLater(
        spec.tasks,
        split_channels=spec.split_shape[0],
        last_channels=spec.last_shape[0],
        hidden=spec.model.decoder.task_channels,
        signed=spec.last_signed,
    )


def new_client_extension(spec: ModelSpec, number: int, client: Client) -> ClientExtension:
    """What an extension has of its own on this client."""
    kind, rank = spec.model.conditioning.kind, spec.extensions[number].rank
    return ClientExtension(client, kind, rank=rank)


def new_extension(spec: ModelSpec, number: int, client: Client) -> Extension:
    """All that an extension of the codec with this client has of its own."""
    own = spec.extended(number)
    return Extension(
        new_client_extension(spec, number, client), new_bottleneck(own), new_answers(own)
    )
