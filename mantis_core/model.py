"""The whole codec as it is trained and evaluated: client, bottleneck and server put together.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.answer import Answer, Encoded
from mantis_core.bottleneck import Bottleneck
from mantis_core.client import Client, select_mask
from mantis_core.client_codec import ClientCodec
from mantis_core.coder import TableSet
from mantis_core.inference import still
from mantis_core.preprocessing import prepare_image
from mantis_core.server_codec import ServerCodec, new_joint, new_server
from mantis_core.spec import ModelSpec


class Mantis(nn.Module):
    """Task-adaptive codec.

    x ─ stem ─┬─ detector ─▶ p ─ conditioning ─▶ gamma, beta
              └───────────── encoder ─────────┴─▶ latent ─ round ─ coder(table[mask]) ─▶ bits
    bits ─ coder ─▶ latent ─ decoder ─ trunk ─ decoder_k ─ tail_k, k in mask ─▶ joint decision

    Encodes as its `client_codec` and decodes as its `server_codec`, which are what is loaded where
    there is only one half.
    """

    mask_threshold: Tensor

    def __init__(self, spec: ModelSpec, *, trunk: nn.Module | None = None) -> None:
        """`trunk`: the teacher's blocks behind its split; none builds them untrained, by name."""
        super().__init__()
        self.spec = spec
        config = spec.model
        self.client = Client(config, len(spec.tasks), spec.class_members())
        self.bottleneck = Bottleneck(
            config.encoder.latent_channels,
            len(spec.tasks),
            config.prior,
            quantizer=config.quantizer,
            neighbour_contexts=config.neighbour_contexts,
        )
        self.server = new_server(spec, trunk)
        self.joint = new_joint(spec)
        self.register_buffer("mask_threshold", torch.tensor(0.5))
        self._model_id: bytes | None = None
        self.register_load_state_dict_post_hook(_forget_id)  # type: ignore[no-untyped-call]

    def client_codec(self) -> ClientCodec:
        """The client half of this model, sharing its weights; RuntimeError before `finish`."""
        return ClientCodec(
            self.spec,
            self.client,
            self.tables(),
            self.mask_threshold,
            self.model_id(),
            estimate=self._estimate,
        )

    def server_codec(self) -> ServerCodec:
        """The server half of this model, sharing its weights; RuntimeError before `finish`."""
        return ServerCodec(self.spec, self.server, self.joint, self.tables(), self.model_id())

    def encode(
        self,
        images: Tensor,
        tasks: Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
    ) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each, as ClientCodec.encode."""
        return self.client_codec().encode(images, tasks, exit_confidence=exit_confidence)

    def encode_in_detail(
        self,
        images: Tensor,
        tasks: Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
    ) -> list[Encoded]:
        """As `encode`, with the sizes, the estimate and the detector's view of each image."""
        codec = self.client_codec()
        return codec.encode_in_detail(images, tasks, exit_confidence=exit_confidence)

    def decode(self, streams: Iterable[bytes]) -> list[Answer]:
        """Streams to answers, as ServerCodec.decode."""
        return self.server_codec().decode(streams)

    def select_mask(self, probabilities: Tensor) -> Tensor:
        """Which tasks a stream carries, bool (B, K), from p (B, K)."""
        return select_mask(probabilities, self.mask_threshold, self.spec.model.max_active_tasks)

    def tables(self) -> TableSet:
        """The integer tables; RuntimeError before `finish`."""
        return self.bottleneck.tables()

    def model_id(self) -> bytes:
        """The 4 bytes that a stream names its model by, see ModelSpec.model_id."""
        if self._model_id is None:
            self._model_id = self.spec.model_id(self.state_dict())
        return self._model_id

    def finish(self) -> None:
        """Makes the integer tables from the weights as they are; training is over."""
        self.bottleneck.update_tables()
        self.eval()
        self._model_id = None

    def train(self, mode: bool = True) -> Self:
        """As usual; the id worked out from the weights is forgotten."""
        if mode:
            self._model_id = None
        super().train(mode)
        return self

    def prepare_image(self, data: bytes) -> Tensor:
        """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop."""
        return prepare_image(data, self.spec.image_size, self.spec.short_side)

    def describe(self) -> dict[str, Any]:
        """What a person or the registry wants to know: tasks, sizes, multiply-adds, id."""
        return {
            "model_id": self.model_id().hex(),
            "tasks": {task.name: list(task.labels) for task in self.spec.tasks},
            "classes": len(self.spec.classes),
            "image_size": list(self.spec.image_size),
            **self.client_codec().describe(),
            **self.server_codec().describe(),
        }

    def _estimate(self, latent: Tensor, mask: Tensor, primary: Tensor) -> Tensor:
        with still(self.bottleneck):
            return self.bottleneck(latent, mask, primary).bits  # type: ignore[no-any-return]


def _forget_id(model: Mantis, _: object) -> None:
    model._model_id = None
