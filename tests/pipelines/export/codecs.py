"""Codecs of every kind of client that can be exported, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig, EncoderConfig, ModelConfig
from mantis_core.codec.mantis import Mantis
from mantis_core.config import LossTerm
from tests.mantis_core.conftest import make_config, make_problem, make_stage2

CLASSES = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
RATES = (1e-3, 4e-3)


def _detecting() -> Mantis:
    model = make_config(detector=CLASSES, send_answer=True)
    return make_stage2(make_problem(), model).student


def _attentive() -> Mantis:
    encoder = EncoderConfig(channels=8, blocks=1, latent_channels=4, start="detector")
    attention = ConditioningConfig(kind="attention", hidden=8)
    model = make_config(encoder=encoder, conditioning=attention, detector=CLASSES)
    return make_stage2(make_problem(), model, rate_weights=RATES).student


def _mapped() -> Mantis:
    model = make_config(conditioning=ConditioningConfig(kind="features", hidden=8))
    return make_stage2(make_problem(single_class=False), model).student


def _asked() -> Mantis:
    model = make_config(
        requests="asked",
        prior="request",
        exit_heads=True,
        neighbour_contexts=True,
        conditioning=ConditioningConfig(kind="gated", hidden=8),
    )
    terms = {"tasks": LossTerm(criterion="TaskLosses"), "exits": LossTerm(criterion="ExitAnswers")}
    problem = make_problem(single_class=False)
    return make_stage2(problem, model, rate_weights=RATES, losses=terms).student


def _lite() -> Mantis:
    encoder = EncoderConfig(channels=8, blocks=0, latent_channels=4, stride=16)
    model = ModelConfig(
        client="lite0",
        requests="asked",
        prior="request",
        encoder=encoder,
        decoder=make_config().decoder,
        conditioning=ConditioningConfig(kind="gated", hidden=8),
    )
    return make_stage2(make_problem(single_class=False), model, rate_weights=RATES).student


KINDS: dict[str, Callable[[], Mantis]] = {
    "detecting": _detecting,
    "attentive": _attentive,
    "mapped": _mapped,
    "asked": _asked,
    "lite": _lite,
}


def codec_of(kind: str) -> Mantis:
    """A finished codec with random weights, whose latents and answers are not trivial."""
    torch.manual_seed(1)
    codec = KINDS[kind]()
    with torch.no_grad():
        codec.client.encoder.to_latent.weight.mul_(8)
        codec.mask_threshold.fill_(0.3)
        for parameter in codec.client.conditioning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    codec.finish()
    return codec
