"""A client's networks in torch, as `device/look.py` runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from mantis_core.device.look import Floats, Glimpse, Latents
from mantis_core.networks.client import Client
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.detector import View
from mantis_core.networks.inference import one_thread, still
from mantis_core.networks.preprocessing import normalise


class ClientNetwork:
    """A client on its device. On a CPU it computes on one thread: with more, kernels round
    differently, and symbols must not depend on the machine's cores."""

    def __init__(self, client: Client, num_rates: int) -> None:
        self.client, self.num_rates = client, num_rates

    @property
    def alone(self) -> bool:
        """Whether images pass one by one: on a CPU."""
        return self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.client.parameters()).device

    @torch.no_grad()
    def see(self, images: Tensor) -> Glimpse:
        """uint8 images (B, 3, H, W) through stem and detector, see `Network`."""
        with self._as_shipped():
            view = self.client(normalise(images))
            detected = torch.sigmoid(view.logits.float())
            classes = None
            if view.class_logits is not None:
                classes = torch.softmax(view.class_logits.float(), dim=1).cpu().numpy()
        return Glimpse(detected.cpu().numpy(), classes, view)

    @torch.no_grad()
    def code(self, features: View, rows: Sequence[int], condition: Floats, level: int) -> Latents:
        """Images of a view through the encoder, see `Network`."""
        with self._as_shipped():
            view = features if len(rows) == len(features.stem) else _rows_of(features, rows)
            told = torch.from_numpy(condition).to(view.stem.device)
            everyone = torch.full((len(rows),), level, device=told.device)
            latent, exits = self.client.code(view, told, shares_of(everyone, self.num_rates))
            answers = None
            if exits is not None:
                parts = [torch.softmax(logits, dim=1) for logits in exits]
                answers = torch.cat(parts, dim=1).cpu().numpy()
        return Latents(latent.float().cpu().numpy(), answers)

    @contextmanager
    def _as_shipped(self) -> Iterator[None]:
        with ExitStack() as contexts:
            if self.alone:
                contexts.enter_context(one_thread())
            contexts.enter_context(still(self.client))
            yield


def _rows_of(view: View, rows: Sequence[int]) -> View:
    own, classes = list(rows), view.class_logits
    return View(
        view.stem[own],
        view.detected[own],
        view.logits[own],
        None if classes is None else classes[own],
    )
