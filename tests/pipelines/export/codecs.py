"""Codecs of every kind of client that can be exported, with random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig, EncoderConfig, ModelConfig
from mantis_core.codec.mantis import Mantis
from mantis_core.config import LossTerm
from tests.mantis_core.conftest import make_config, make_problem, make_stage2

CLASSES = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
RATES = (1e-3, 4e-3)


def _detecting(network: str) -> Mantis:
    model = make_config(detector=CLASSES, send_answer=True)
    return make_stage2(make_problem(), model, network=network).student


def _attentive(network: str) -> Mantis:
    encoder = EncoderConfig(channels=8, blocks=1, latent_channels=4, start="detector")
    attention = ConditioningConfig(kind="attention", hidden=8)
    model = make_config(encoder=encoder, conditioning=attention, detector=CLASSES)
    return make_stage2(make_problem(), model, network=network, rate_weights=RATES).student


def _mapped(network: str) -> Mantis:
    model = make_config(conditioning=ConditioningConfig(kind="features", hidden=8))
    return make_stage2(make_problem(single_class=False), model, network=network).student


def _asked(network: str) -> Mantis:
    model = make_config(
        requests="asked",
        prior="request",
        exit_heads=True,
        neighbour_contexts=True,
        conditioning=ConditioningConfig(kind="gated", hidden=8),
    )
    terms = {"tasks": LossTerm(criterion="TaskLosses"), "exits": LossTerm(criterion="ExitAnswers")}
    problem = make_problem(single_class=False)
    recipe = make_stage2(problem, model, network=network, rate_weights=RATES, losses=terms)
    return recipe.student


def _lite(network: str) -> Mantis:
    encoder = EncoderConfig(channels=8, blocks=0, latent_channels=4, stride=16)
    model = ModelConfig(
        client="lite0",
        requests="asked",
        prior="request",
        encoder=encoder,
        decoder=make_config().decoder,
        conditioning=ConditioningConfig(kind="gated", hidden=8),
    )
    problem = make_problem(single_class=False)
    return make_stage2(problem, model, network=network, rate_weights=RATES).student


KINDS: dict[str, Callable[[str], Mantis]] = {
    "detecting": _detecting,
    "attentive": _attentive,
    "mapped": _mapped,
    "asked": _asked,
    "lite": _lite,
}


def codec_of(kind: str, network: str = "resnet18") -> Mantis:
    """A finished codec with random weights, whose latents and answers are not trivial.

    `network` is its teacher's: one of torchvision's where another process loads the codec.
    """
    torch.manual_seed(1)
    codec = KINDS[kind](network)
    with torch.no_grad():
        codec.client.encoder.to_latent.weight.mul_(8)
        codec.mask_threshold.fill_(0.3)
        for parameter in codec.client.conditioning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    codec.finish()
    return codec


def copied_graphs(folder: Path) -> Callable[..., None]:
    """Stands for `write_graphs`, which takes seconds: copies those of an export of the codec."""

    def write_graphs(codec: object, *paths: Path) -> None:
        for path in paths:
            shutil.copy(folder / path.name, path)

    return write_graphs
