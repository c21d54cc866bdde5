"""Small bottlenecks and latents, for the tests of the density and of the tables made from it."""

import torch

from mantis_core.networks.bottleneck import Bottleneck

PRIORS = ("shared", "per_task", "primary")
CHANNELS, TASKS, BATCH = 4, 3, 6


def build(prior="per_task", seed=0, **kwargs):
    """A bottleneck whose rows and channels differ, narrow enough for tiny latents."""
    torch.manual_seed(seed)
    bottleneck = Bottleneck(CHANNELS, TASKS, prior, **kwargs)
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return bottleneck


def batch(seed=0, scale=3.0, side=6):
    generator = torch.Generator().manual_seed(seed)
    latent = scale * torch.randn(BATCH, CHANNELS, side, side, generator=generator)
    mask = torch.rand(BATCH, TASKS, generator=generator) < 0.4
    primary = torch.randint(TASKS, (BATCH,), generator=generator)
    mask[torch.arange(BATCH), primary] = True
    return latent, mask, primary
