"""The client half at work: images to streams. Needs stem, detector, encoder and tables alone.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.packed_tables import pack_counts
from mantis_core.bitstream.session import Session
from mantis_core.bitstream.wire import Packed, write_message, write_stream
from mantis_core.codec.answer import Encoded
from mantis_core.codec.network import ClientNetwork
from mantis_core.codec.packed_weights import pack_weights
from mantis_core.codec.spec import Ids, ModelSpec
from mantis_core.device.client import DeviceClient
from mantis_core.device.look import Seen
from mantis_core.device.requests import Way
from mantis_core.networks.client import Client
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.cost import macs_of
from mantis_core.networks.extension import ClientExtension
from mantis_core.networks.preprocessing import prepare_image, prepare_images
from mantis_core.pixels import MAX_PIXELS

_INT32_BYTES = 4
_ESTIMATED_TOGETHER = 16  # images: a density holds dozens of values for each of their symbols

Estimate = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Bits (B,) of a latent (B, C, h, w) under a density, given mask (B, K), primary task (B,) and
shares of the rates (B, L), None for a model of one."""


class ClientCodec(DeviceClient[Tensor]):
    """A client in torch. What it does is told in `DeviceClient`; images are uint8 tensors."""

    array_type, array_name = Tensor, "tensor"
    network: ClientNetwork

    def __init__(
        self,
        spec: ModelSpec,
        client: Client,
        tables: TableSet,
        mask_threshold: Tensor,
        ids: Ids,
        *,
        answer_counts: Tensor | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        """`mask_threshold` is a scalar; `estimate` is None without the density of training.

        `answer_counts` (17, 8) are those of confidence, for a model that sends its answers.
        """
        super().__init__(
            spec.facts,
            ClientNetwork(client, spec.num_rates),
            tables,
            spec.stream_spec(ids.stream, answer_counts),
            float(mask_threshold),
        )
        self.spec, self.client, self.ids = spec, client, ids
        self.estimate = estimate
        self.of_its_own: ClientExtension | None = None  # of a client that is an extension

    def encode_in_detail(
        self,
        images: Tensor,
        tasks: str | Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[Encoded]:
        """As `encode`, with the sizes and the detector's view of each image."""
        own = self.for_tasks(tasks)
        way = Way(tasks, exit_confidence, level, own.budget(max_bytes))
        (encoded,) = own.encode_each_way(images, [way])
        return encoded

    def encode_each_way(self, images: Tensor, ways: Sequence[Way]) -> list[list[Encoded]]:
        """For each of `ways` all images, as `encode_in_detail` gives them.

        What ways have in common is computed once: an image passes stem and detector once, and a
        latent that several ways send is coded once, but for tasks of an extension.
        """
        owners = [self.for_tasks(way.tasks) for way in ways]
        if any(own is not self for own in owners):
            pairs = zip(owners, ways, strict=True)
            return [found for own, way in pairs for found in own.encode_each_way(images, [way])]
        self.check_images(images)
        seen = list(self.looker.look(images, ways))
        packed: dict[int, Packed] = {}
        for each in (image for images_ways in seen for image in images_ways):
            if id(each.image) not in packed:
                packed[id(each.image)] = write_stream(
                    [each.image], each.input_shape, self.tables, self.stream_spec
                )
        bits = self._estimates([image for images_ways in seen for image in images_ways])
        return [
            [self._encoded(own[number], packed, bits, asked=way.tasks is not None) for own in seen]
            for number, way in enumerate(ways)
        ]

    def _encoded(
        self, seen: Seen, packed: Mapping[int, Packed], bits: Mapping[int, float], *, asked: bool
    ) -> Encoded:
        own = packed[id(seen.image)]
        return Encoded(
            own.data,
            own.payload_bytes,
            bits[id(seen.image)],
            seen.probabilities,
            np.array(seen.image.tasks.mask),
            not seen.image.has_latent,
            seen.client_class,
            self._session_bytes(seen, own, requests=asked),
            seen.image.rate_level,
        )

    @torch.no_grad()
    def _estimates(self, seen: Sequence[Seen]) -> dict[int, float]:
        """The estimated bits of each image's latent by the id of the image, 0 without a latent."""
        bits = {id(each.image): 0.0 for each in seen}
        sent = {id(each.image): each for each in seen if each.latent is not None}
        if self.estimate is None:
            return bits | dict.fromkeys(sent, float("nan"))
        every = list(sent.items())
        for first in range(0, len(every), _ESTIMATED_TOGETHER):
            some = every[first : first + _ESTIMATED_TOGETHER]
            latents = np.stack([each.latent for _, each in some if each.latent is not None])
            latent = torch.from_numpy(latents).to(self.network.device)
            fields = [each.image.tasks for _, each in some]
            mask = torch.tensor([field.mask for field in fields], device=latent.device)
            primary = torch.tensor([field.primary for field in fields], device=latent.device)
            level = torch.tensor([each.image.rate_level for _, each in some], device=latent.device)
            shares = shares_of(level, self.spec.num_rates)
            found = self.estimate(latent, mask, primary, shares).tolist()
            bits |= zip((key for key, _ in some), found, strict=True)
        return bits

    def _session_bytes(self, seen: Seen, packed: Packed, *, requests: bool) -> int:
        """The size of an image's message; of a reply to a request, which holds no task field.

        A model of version 1 has no sessions: -1.
        """
        spec = self.stream_spec
        if spec.version == 1:
            return -1
        if not requests:
            return packed.session_bytes
        form = Session(seen.input_shape, requests=True)
        return write_message(seen.image, form, b"", self.tables, spec).session_bytes

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
        """Size in a folder, and multiply-adds for one image of the model's own size.

        Extensions count for the size. The multiply-adds are those of the client's own tasks.
        `detector_macs` are those that only detection needs.
        """
        spec, tables = self.spec, self.tables
        macs = macs_of(
            spec.model,
            len(spec.tasks),
            spec.image_size,
            spec.class_members(),
            spec.exit_labels(),
        )
        parts: list[tuple[nn.Module, TableSet]] = [(self.client, tables)]
        parts += [(own.of_its_own, own.tables) for own in self.extensions if own.of_its_own]
        return {
            "client_parameters": sum(p.numel() for own, _ in parts for p in own.parameters()),
            "client_bytes": sum(_bytes_of(*part) for part in parts)
            + _INT32_BYTES * sum(map(len, self.stream_spec.confidence)),
            "client_macs": macs.client,
            "detector_macs": macs.detector,
        }


def extension_client(
    spec: ModelSpec,
    number: int,
    client: Client,
    own: ClientExtension,
    tables: TableSet,
    ids: Ids,
    *,
    estimate: Estimate | None = None,
) -> ClientCodec:
    """The client of an extension of the codec with this `spec` and `client`, sharing its weights.

    `ids` are those of the extension's streams and of the whole model.
    """
    extended = spec.extended(number)
    network = own.client(client, len(extended.tasks))
    nothing = torch.tensor(0.5)  # tasks are asked for, never detected
    codec = ClientCodec(extended, network, tables, nothing, ids, estimate=estimate)
    codec.of_its_own = own
    return codec


def _bytes_of(networks: nn.Module, tables: TableSet) -> int:
    counts, weights = pack_counts(tables.cdf, tables.lengths), pack_weights(networks.state_dict())
    packed = sum(weight.nbytes for weight in weights.values())
    return packed + sum(array.nbytes for array in (counts, tables.offsets, tables.lengths))
