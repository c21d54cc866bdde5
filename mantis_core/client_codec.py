"""The client half at work: images to streams. Needs stem, detector, encoder and tables alone.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mantis_core.answer import Encoded
from mantis_core.client import Client, primary_task, select_mask
from mantis_core.coder import TableSet, to_symbols
from mantis_core.errors import ModelError
from mantis_core.inference import one_thread, still
from mantis_core.latent import Latent
from mantis_core.preprocessing import normalise, prepare_image
from mantis_core.spec import ModelSpec
from mantis_core.task_field import TaskField, quantise_log2
from mantis_core.wire import CodedImage, write_stream

Estimate = Callable[[Latent, Tensor, Tensor], Tensor]
"""Bits (B,) of a latent under a density, given mask (B, K) and primary task (B,)."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the client made of one image. probabilities are the detector's (K,)."""

    image: CodedImage
    input_shape: tuple[int, int]
    probabilities: NDArray[np.float32]
    estimated_bits: float


class ClientCodec:
    """Images to streams. Holds no decoder and no weight of one."""

    def __init__(
        self,
        spec: ModelSpec,
        client: Client,
        tables: TableSet,
        mask_threshold: Tensor,
        model_id: bytes,
        *,
        estimate: Estimate | None = None,
    ) -> None:
        """`mask_threshold` is a scalar; `estimate` the density of training, where it is at hand."""
        self.spec, self.client, self.tables = spec, client, tables
        self.mask_threshold, self.model_id, self.estimate = mask_threshold, model_id, estimate
        self.stream_spec = spec.stream_spec(model_id)

    def encode(self, images: Tensor, tasks: Sequence[str] | Tensor | None = None) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each.

        `tasks` None detects them; names ask for these alone, of every image; a bool tensor (B, K)
        says which for each. Raises ModelError for an unknown name or images of another kind.
        """
        return [encoded.data for encoded in self.encode_in_detail(images, tasks)]

    def encode_in_detail(
        self, images: Tensor, tasks: Sequence[str] | Tensor | None = None
    ) -> list[Encoded]:
        """As `encode`, with the sizes and the detector's view of each image."""
        encoded = []
        for seen in self.look(images, tasks):
            data, payload_bytes = write_stream(
                [seen.image], seen.input_shape, self.tables, self.stream_spec
            )
            mask = np.array(seen.image.tasks.mask)
            encoded.append(
                Encoded(data, payload_bytes, seen.estimated_bits, seen.probabilities, mask)
            )
        return encoded

    def write_together(self, images: Sequence[Seen]) -> bytes:
        """One stream of images of one shape that `look` has seen.

        Raises BitstreamError (too_large) for more than a stream may hold.
        """
        shapes = {seen.input_shape for seen in images}
        if len(shapes) != 1:
            raise ModelError(f"images of {sorted(shapes)} pixels; a stream holds one shape")
        coded = [seen.image for seen in images]
        return write_stream(coded, shapes.pop(), self.tables, self.stream_spec).data

    @torch.no_grad()
    def look(self, images: Tensor, tasks: Sequence[str] | Tensor | None = None) -> Iterator[Seen]:
        """The task field and symbols of each of `images`; arguments and errors as `encode`.

        On a CPU each image passes the network alone and on one thread: what is sent of it must not
        depend on the images beside it or on the machine's cores, and kernels round differently for
        other batch sizes and numbers of threads.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ModelError(
                f"images are {images.dtype} {tuple(images.shape)}; allowed: uint8 (B, 3, H, W)"
            )
        asked = self._asked(tasks, len(images), images.device)
        if images.device.type != "cpu":
            yield from self._look(images, asked)
            return
        for row in range(len(images)):
            own = slice(row, row + 1)
            with one_thread():
                seen = list(self._look(images[own], None if asked is None else asked[own]))
            yield from seen

    def prepare_image(self, data: bytes) -> Tensor:
        """An image file's bytes to uint8 (3, H, W) as in evaluation: short side, centre crop."""
        return prepare_image(data, self.spec.image_size, self.spec.short_side)

    def describe(self) -> dict[str, Any]:
        """Size and multiply-adds of the client for one image of the model's own size."""
        device = next(self.client.parameters()).device
        image = torch.zeros(1, 3, *self.spec.image_size, device=device)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), still(self.client), counter:
            view = self.client(normalise(image))
            self.client.encode(view, torch.sigmoid(view.logits))
        parameters = sum(p.numel() for p in self.client.parameters())
        tables = self.tables.cdf.nbytes + self.tables.offsets.nbytes + self.tables.lengths.nbytes
        return {
            "client_parameters": parameters,
            "client_bytes": 4 * parameters + tables,
            "client_macs": counter.get_total_flops() // 2,
        }

    def _look(self, images: Tensor, asked: Tensor | None) -> Iterator[Seen]:
        with still(self.client):
            view = self.client(normalise(images))
            detected = torch.sigmoid(view.logits.float())
            mask = asked
            if mask is None:
                limit = self.spec.model.max_active_tasks
                mask = select_mask(detected, self.mask_threshold, limit)
            primary = primary_task(detected, mask)
            latent = self.client.encode(view, detected if asked is None else asked.float())
            bits = [float("nan")] * len(images)
            if self.estimate is not None:
                bits = self.estimate(latent, mask, primary).tolist()
        sends = self.spec.model.send_probabilities and asked is None
        maps = to_symbols(latent.map.float().cpu().numpy())
        summaries = to_symbols(latent.summary.float().cpu().numpy())
        masks, probabilities = mask.cpu().numpy(), detected.cpu().numpy()
        for i, first in enumerate(primary.tolist()):
            active = masks[i]
            levels = tuple(quantise_log2(float(p)) for p in probabilities[i][active])
            field = TaskField(tuple(active.tolist()), first, levels if sends else None)
            yield Seen(
                CodedImage(field, maps[i], summaries[i]),
                (int(images.shape[2]), int(images.shape[3])),
                probabilities[i],
                bits[i],
            )

    def _asked(
        self, tasks: Sequence[str] | Tensor | None, count: int, device: torch.device
    ) -> Tensor | None:
        if tasks is None:
            return None
        if isinstance(tasks, Tensor):
            empty = (~tasks.any(dim=1)).nonzero()
            if len(empty):
                raise ModelError(f"image {int(empty[0])} is asked about no task; name at least one")
            return tasks.to(device)
        names = self.spec.task_names
        unknown = [name for name in tasks if name not in names]
        if unknown or not tasks:
            raise ModelError(
                f"tasks {unknown or 'none'} asked for; this model has {', '.join(names)}"
            )
        wanted = torch.tensor([name in tasks for name in names], device=device)
        return wanted.expand(count, -1)
