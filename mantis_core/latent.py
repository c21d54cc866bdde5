"""The latent: what the encoder makes of an image, what is rounded and coded, what is received."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Latent(NamedTuple):
    """A map (B, C, h, w) and a summary (B, G) of the whole image; G may be 0."""

    map: Tensor
    summary: Tensor
