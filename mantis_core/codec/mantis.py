"""The whole codec as it is trained and evaluated: client, bottleneck and server put together.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mantis_core.bitstream.coder import TableSet
from mantis_core.codec.answer import Answer, Encoded
from mantis_core.codec.client_codec import ClientCodec, Estimate, extension_client
from mantis_core.codec.halves import (
    new_bottleneck,
    new_client,
    new_extension,
    new_joint,
    new_server,
)
from mantis_core.codec.masks import primary_task, select_mask
from mantis_core.codec.own_answer import ClientAnswers, Fusion, even_counts
from mantis_core.codec.packed_weights import round_weights
from mantis_core.codec.server_codec import ServerCodec, extension_server
from mantis_core.codec.spec import Ids, ModelSpec
from mantis_core.codec.tables import table_set, update_tables
from mantis_core.device.requests import Way
from mantis_core.networks.bottleneck import Bottleneck
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.detector import View
from mantis_core.networks.extension import Extension
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import prepare_image, prepare_images
from mantis_core.networks.server import decided
from mantis_core.pixels import MAX_PIXELS


class MantisOutput(NamedTuple):
    """What a codec computes of images without coding them: all that losses and figures read.

    bits (B,): the estimated size of each latent. task_logits (B, K). class_logits (B, classes + 1),
    None if the detector names tasks alone. mask (B, K) bool: the tasks that a stream would carry.
    tasks: for each task, active or not, log P (B, n + 1) or segmentation logits (B, n, H, W).
    joint (B, classes): scores of the joint decision over all tasks, by the detector's
    probabilities. decision (B,): the class with the best score over the tasks in the mask, -1 if
    these are all segmentations. These two are None where images have no single class. exits: the
    client's own logits (B, n) of each task, None for a client without exit heads.
    """

    bits: Tensor
    task_logits: Tensor
    class_logits: Tensor | None
    mask: Tensor
    tasks: dict[str, Tensor]
    joint: Tensor | None
    decision: Tensor | None
    exits: tuple[Tensor, ...] | None = None


class Mantis(nn.Module):
    """Task-adaptive codec.

    x ─ stem ─┬─ detector ─▶ p ─ conditioning ─▶ gamma, beta
              └───────────── encoder ─────────┴─▶ latent ─ round ─ coder(table[mask]) ─▶ bits
    bits ─ coder ─▶ latent ─ decoder ─ trunk ─ decoder_k ─ tail_k, k in mask ─▶ joint decision

    With `model.send_answer` the detector's own label goes along, and `fusion` decides with it.
    `forward` is the same way without the coder, for training. A finished model encodes by its
    `client_codec` and decodes by its `server_codec`; each of these can be loaded alone.
    """

    mask_threshold: Tensor
    answer_counts: Tensor

    def __init__(self, spec: ModelSpec, *, trunk: nn.Module | None = None) -> None:
        """Takes the teacher's blocks behind its split as `trunk`; None builds them untrained."""
        super().__init__()
        self.spec = spec
        self.client, self.bottleneck = new_client(spec), new_bottleneck(spec)
        self.server = new_server(spec, trunk)
        self.joint = new_joint(spec)
        numbers = range(len(spec.extensions))
        self.extensions = nn.ModuleList(new_extension(spec, n, self.client) for n in numbers)
        self.register_buffer("mask_threshold", torch.tensor(0.5))
        self.fusion: Fusion | None = None
        if spec.sends_answer:
            self.own_answers = ClientAnswers(spec.tasks, len(spec.classes))
            self.fusion = Fusion(spec.num_rates)
            self.register_buffer("answer_counts", even_counts())
        self._model_id: bytes | None = None
        self._stream_ids: tuple[bytes, ...] | None = None
        self._tables: TableSet | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(
        self,
        images: Tensor,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        view: View | None = None,
        heard: Tensor | None = None,
        level: Tensor | None = None,
    ) -> MantisOutput:
        """Normalised images (B, 3, H, W) through the whole codec, its latent not coded.

        `condition` (B, K) float are the task probabilities that the encoder reads, `mask` (B, K)
        bool the tasks that the stream would carry. None takes both as the detector says, without a
        gradient to it. `view` is `client(images)`, for a caller that has looked already: stem and
        detector then do not run again. `heard` (B,) bool are the images whose own answer by the
        client counts; None is all of them. `level` (B,) int64 are the rate levels, for a model of
        several rates; None is level 0 for all.
        """
        if view is None:
            view = self.client(images)
        detected = torch.sigmoid(view.logits.float()).detach()
        if condition is None:
            condition = detected
            if self.spec.model.requests == "asked":
                condition = torch.ones_like(detected)
        if mask is None:
            mask = self.select_mask(detected)
        shares = self._shares(level, len(images), images.device)
        latent, exits = self.client.code(view, condition, shares)
        primary = primary_task(detected, mask)
        received = self.bottleneck(latent, mask, primary, shares)
        tasks = self.server(received.y_hat, (images.shape[2], images.shape[3]), shares)
        if self.fusion is not None:
            assert view.class_logits is not None
            answer = self.own_answers(view.class_logits.detach(), primary)
            if heard is not None:
                answer = answer._replace(label=answer.label.masked_fill(~heard, -1))
            tasks = self.fusion.stacked(tasks, self.server.layout, primary, answer, shares)
        joint = decision = None
        if self.joint is not None:
            log_p = logsigmoid(view.logits.float())
            joint = self.joint(tasks, log_p)
            sent = log_p.detach().masked_fill(~mask, -torch.inf)
            decision = decided(self.joint(tasks, sent))
        return MantisOutput(
            received.bits, view.logits, view.class_logits, mask, tasks, joint, decision, exits
        )

    def client_codec(self) -> ClientCodec:
        """The client half of this model, sharing its weights; RuntimeError before `finish`."""
        return self._client_codec(partial(_estimate, self.bottleneck))

    def server_codec(self) -> ServerCodec:
        """The server half of this model, sharing its weights; RuntimeError before `finish`."""
        return ServerCodec(
            self.spec,
            self.server,
            self.joint,
            self.tables(),
            self.ids(),
            fusion=self.fusion,
            answer_counts=self._answer_counts(),
            extensions=[
                extension_server(
                    self.spec, n, self.server, self.extension(n).server, *self._coding(n)
                )
                for n in range(len(self.extensions))
            ],
        )

    def encode(
        self,
        images: Tensor,
        tasks: str | Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each, as ClientCodec.encode."""
        codec = self._client_codec(None)  # nobody reads the estimates
        return codec.encode(
            images, tasks, exit_confidence=exit_confidence, level=level, max_bytes=max_bytes
        )

    def encode_in_detail(
        self,
        images: Tensor,
        tasks: str | Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[Encoded]:
        """As `encode`, with the sizes, the estimate and the detector's view of each image."""
        codec = self.client_codec()
        return codec.encode_in_detail(
            images, tasks, exit_confidence=exit_confidence, level=level, max_bytes=max_bytes
        )

    def encode_each_way(self, images: Tensor, ways: Sequence[Way]) -> list[list[Encoded]]:
        """uint8 images (B, 3, H, W) in several ways, as ClientCodec.encode_each_way."""
        return self.client_codec().encode_each_way(images, ways)

    def decode(self, streams: Iterable[bytes]) -> list[Answer]:
        """Streams to answers, as ServerCodec.decode."""
        return self.server_codec().decode(streams)

    def select_mask(self, probabilities: Tensor) -> Tensor:
        """Which tasks a stream carries, bool (B, K), from p; of a model that is asked, all."""
        if self.spec.model.requests == "asked":
            return torch.ones_like(probabilities, dtype=torch.bool)
        return select_mask(probabilities, self.mask_threshold, self.spec.model.max_active_tasks)

    def tables(self) -> TableSet:
        """The integer tables; RuntimeError before `finish`."""
        if self._tables is None:
            self._tables = table_set(self.bottleneck)
        return self._tables

    def model_id(self) -> bytes:
        """The 4 bytes that name all of this model, see ModelSpec.model_id."""
        if self._model_id is None:
            self._model_id = self.spec.model_id(self.state_dict())
        return self._model_id

    def ids(self) -> Ids:
        """What the model's streams and the model itself are named by."""
        return Ids(self.stream_ids()[0], self.model_id())

    def stream_ids(self) -> tuple[bytes, ...]:
        """The ids of the model's streams, and of those of each extension."""
        if self._stream_ids is None:
            state, numbers = self.state_dict(), range(len(self.spec.extensions))
            extended = (self.spec.extension_id(state, number) for number in numbers)
            self._stream_ids = (self.spec.stream_id(state), *extended)
        return self._stream_ids

    def finish(self) -> None:
        """Makes the integer tables, and rounds the client's weights to float16; training is over.

        What is evaluated is then what is shipped. See `round_weights` for weights it leaves.
        """
        update_tables(self.bottleneck)
        round_weights(self.client)
        self.eval()
        _forget(self, None)

    def finish_extension(self, number: int) -> None:
        """As `finish`, for an extension alone; all else stays as it is."""
        own = self.extension(number)
        update_tables(own.bottleneck)
        round_weights(own.client)
        self.eval()
        _forget(self, None)

    def extension(self, number: int) -> Extension:
        """What an extension has of its own."""
        own = self.extensions[number]
        assert isinstance(own, Extension)
        return own

    def train(self, mode: bool = True) -> Self:
        """Switches the mode, and forgets the id: in training the weights change."""
        if mode:
            self._model_id = self._stream_ids = None
        super().train(mode)
        return self

    def prepare_image(self, data: bytes, *, max_pixels: float = MAX_PIXELS) -> Tensor:
        """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop.

        Raises ImageError for a file that does not decode or is of more than `max_pixels`.
        """
        size, short_side = self.spec.image_size, self.spec.short_side
        return prepare_image(data, size, short_side, max_pixels=max_pixels)

    def prepare_images(self, files: Sequence[bytes]) -> Tensor:
        """Image files' bytes to uint8 (B, 3, H, W), each as `prepare_image` does.

        Raises ImageError with the numbers of those that cannot be read, and why.
        """
        return prepare_images(files, self.spec.image_size, self.spec.short_side)

    def describe(self) -> dict[str, Any]:
        """Facts for people and for the registry: tasks, sizes, multiply-adds, id."""
        return {
            "model_id": self.model_id().hex(),
            "stream_id": self.ids().stream.hex(),
            "tasks": {task.name: list(task.labels) for task in self.spec.tasks},
            **({"added": added} if (added := self._added()) else {}),
            **({"extensions": others} if (others := self._extended()) else {}),
            "classes": len(self.spec.classes),
            "image_size": list(self.spec.image_size),
            **self.client_codec().describe(),
            **self.server_codec().describe(),
        }

    def _added(self) -> dict[str, Any]:
        return {
            own.task.name: {"labels": list(own.task.labels), "through": list(own.through)}
            for own in self.spec.added
        }

    def _extended(self) -> list[dict[str, Any]]:
        return [
            {
                "stream_id": self.stream_ids()[number + 1].hex(),
                "tasks": {task.name: list(task.labels) for task in own.tasks},
                "rank": own.rank,
                "client_parameters": sum(
                    p.numel() for p in self.extension(number).client.parameters()
                ),
            }
            for number, own in enumerate(self.spec.extensions)
        ]

    def _coding(self, number: int) -> tuple[TableSet, Ids]:
        """What the streams of an extension are coded with and named by."""
        ids = Ids(self.stream_ids()[number + 1], self.model_id())
        return table_set(self.extension(number).bottleneck), ids

    def _client_codec(self, estimate: Estimate | None) -> ClientCodec:
        codec = ClientCodec(
            self.spec,
            self.client,
            self.tables(),
            self.mask_threshold,
            self.ids(),
            answer_counts=self._answer_counts(),
            estimate=estimate,
        )
        extended = []
        for number in range(len(self.extensions)):
            own, coding = self.extension(number), self._coding(number)
            known = None if estimate is None else partial(_estimate, own.bottleneck)
            extended.append(
                extension_client(
                    self.spec, number, self.client, own.client, *coding, estimate=known
                )
            )
        codec.extend(extended)
        return codec

    def _answer_counts(self) -> Tensor | None:
        return None if self.fusion is None else self.answer_counts

    def _shares(self, level: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """The shares of the rates (B, L) for levels (B,); None for a model of one rate."""
        if level is None:
            level = torch.zeros(count, dtype=torch.long, device=device)
        return shares_of(level, self.spec.num_rates)


def _estimate(
    bottleneck: Bottleneck, latent: Tensor, mask: Tensor, primary: Tensor, shares: Tensor | None
) -> Tensor:
    with still(bottleneck):
        return bottleneck(latent, mask, primary, shares).bits  # type: ignore[no-any-return]


def _forget(model: Mantis, _: object) -> None:
    model._model_id = model._stream_ids = model._tables = None
