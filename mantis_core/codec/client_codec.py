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

from mantis_core.bitstream.coder import TableSet, to_symbols
from mantis_core.bitstream.packed_tables import pack_counts
from mantis_core.bitstream.session import Session
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage, Packed, write_message, write_stream
from mantis_core.codec.answer import Encoded
from mantis_core.codec.mask import primary_task, select_mask
from mantis_core.codec.own_answer import ClientAnswers
from mantis_core.codec.packed_weights import pack_weights
from mantis_core.codec.requests import Budget, asked_levels, asked_tasks, check_exit, check_images
from mantis_core.codec.spec import Ids, ModelSpec
from mantis_core.errors import BudgetError, ModelError
from mantis_core.networks.client import Client, View
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.cost import macs_of
from mantis_core.networks.inference import one_thread, still
from mantis_core.networks.preprocessing import normalise, prepare_image, prepare_images
from mantis_core.pixels import MAX_PIXELS

_INT32_BYTES = 4

Estimate = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Bits (B,) of a latent (B, C, h, w) under a density, given mask (B, K), primary task (B,) and
shares of the rates (B, L), None for a model of one."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the client made of one image. probabilities are the detector's (K,).

    `client_class` is the class that its detector gives, -1 where that names tasks alone.
    """

    image: CodedImage
    input_shape: tuple[int, int]
    probabilities: NDArray[np.float32]
    estimated_bits: float
    client_class: int = -1


class ClientCodec:
    """Turns images into streams. Holds no decoder and no weight of one."""

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
        self.spec, self.client, self.tables, self.ids = spec, client, tables, ids
        self.mask_threshold, self.estimate = mask_threshold, estimate
        self.stream_spec = spec.stream_spec(ids.stream, answer_counts)
        self._own_answers = None
        if spec.sends_answer:
            self._own_answers = ClientAnswers(spec.tasks, len(spec.classes))

    def encode(
        self,
        images: Tensor,
        tasks: str | Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each.

        With `tasks` None they are detected. A name or several ask for these tasks alone, of every
        image; a bool tensor (B, K) asks image by image, and one of (1, K) the same of all.
        `exit_confidence` is a probability: where the detector gives an image's class at least that
        much, the client answers itself, and the stream holds the answer and no latent (early exit,
        after Teerapittayanon et al., ICPR 2016). It has no effect where tasks are asked for.

        A model of several rates has levels: `level` 0, which None stands for, gives the largest
        streams and the best answers. With `max_bytes` each image is coded at the lowest level whose
        stream takes no more bytes; where none does, the client answers itself if it can. Raises
        ModelError for an unknown name, for images or tasks of another kind, for an
        `exit_confidence` where the detector names no classes, for a level that the model has not,
        and for an image that `max_bytes` do not hold.
        """
        seen = self.encode_in_detail(
            images, tasks, exit_confidence=exit_confidence, level=level, max_bytes=max_bytes
        )
        return [encoded.data for encoded in seen]

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
        encoded = []
        budget = self.budget(max_bytes)
        for seen in self.look(
            images, tasks, exit_confidence=exit_confidence, level=level, budget=budget
        ):
            packed = write_stream([seen.image], seen.input_shape, self.tables, self.stream_spec)
            mask = np.array(seen.image.tasks.mask)
            encoded.append(
                Encoded(
                    packed.data,
                    packed.payload_bytes,
                    seen.estimated_bits,
                    seen.probabilities,
                    mask,
                    not seen.image.has_latent,
                    seen.client_class,
                    self._session_bytes(seen, packed, requests=tasks is not None),
                    seen.image.rate_level,
                )
            )
        return encoded

    def budget(self, max_bytes: int | None) -> Budget | None:
        """What bounds the stream of each image; None without a bound."""
        return None if max_bytes is None else Budget(max_bytes, self._file)

    def _file(self, image: CodedImage, input_shape: tuple[int, int]) -> bytes:
        return write_stream([image], input_shape, self.tables, self.stream_spec).data

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
    def look(
        self,
        images: Tensor,
        tasks: str | Sequence[str] | Tensor | None = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        budget: Budget | None = None,
    ) -> Iterator[Seen]:
        """The task field and symbols of each of `images`; arguments and errors as `encode`.

        On a CPU each image passes the network alone and on one thread. Kernels round differently
        for other batch sizes and numbers of threads, but the symbols of an image must not depend on
        the images beside it or on the machine's cores.
        """
        check_images(images)
        asked = None
        if tasks is not None:
            asked = asked_tasks(self.spec, tasks, len(images)).to(images.device)
        check_exit(self.spec, exit_confidence)
        levels = asked_levels(self.spec, level, None if budget is None else budget.max_bytes)
        if images.device.type != "cpu":
            yield from self._look(images, asked, exit_confidence, levels, budget)
            return
        for row in range(len(images)):
            own = slice(row, row + 1)
            with one_thread():
                mine = None if asked is None else asked[own]
                seen = list(self._look(images[own], mine, exit_confidence, levels, budget))
            yield from seen

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

        `detector_macs` are those that only detection needs.
        """
        spec, tables = self.spec, self.tables
        macs = macs_of(spec.model, len(spec.tasks), spec.image_size, spec.class_members())
        counts = pack_counts(tables.cdf, tables.lengths)
        weights = pack_weights(self.client.state_dict())
        return {
            "client_parameters": sum(p.numel() for p in self.client.parameters()),
            "client_bytes": sum(weight.nbytes for weight in weights.values())
            + sum(array.nbytes for array in (counts, tables.offsets, tables.lengths))
            + _INT32_BYTES * sum(map(len, self.stream_spec.confidence)),
            "client_macs": macs.client,
            "detector_macs": macs.detector,
        }

    def _look(
        self,
        images: Tensor,
        asked: Tensor | None,
        exit_confidence: float | None,
        levels: range,
        budget: Budget | None,
    ) -> Iterator[Seen]:
        shape = (int(images.shape[2]), int(images.shape[3]))
        with still(self.client):
            view = self.client(normalise(images))
            detected = torch.sigmoid(view.logits.float())
            own: list[CodedImage | None] = [None] * len(images)
            if exit_confidence is not None and asked is None and view.class_logits is not None:
                own = self._answers(view.class_logits, detected, exit_confidence, shape)
            if budget is not None:
                own = [a if a is None or budget.holds(a, shape) else None for a in own]
            rest = [row for row, answer in enumerate(own) if answer is None]
            coded: dict[int, tuple[CodedImage, float]] = {}
            # With a budget each image finds a level of its own.
            for rows in [rest] if rest and budget is None else [[row] for row in rest]:
                some, wanted, theirs = view, asked, detected
                if len(rows) < len(images):
                    some = _rows_of(view, rows)
                    wanted = None if asked is None else asked[rows]
                    theirs = detected[rows]
                if budget is None:
                    found = list(self._code(some, theirs, wanted, levels[0]))
                else:
                    found = [self._fitted(some, theirs, wanted, levels, budget, shape)]
                coded |= zip(rows, found, strict=True)
        probabilities = detected.cpu().numpy()
        named = [-1] * len(images)
        if view.class_logits is not None:
            named = view.class_logits[:, :-1].argmax(dim=1).tolist()
        for row, answer in enumerate(own):
            image, bits = coded[row] if answer is None else (answer, 0.0)
            yield Seen(image, shape, probabilities[row], bits, named[row])

    def _fitted(
        self,
        view: View,
        detected: Tensor,
        asked: Tensor | None,
        levels: range,
        budget: Budget,
        input_shape: tuple[int, int],
    ) -> tuple[CodedImage, float]:
        """One image at a level that the budget holds, by bisection the lowest of `levels`.

        Sizes fall with the level, but for a byte or so between neighbours. If bisection finds none,
        those that it left out are tried, and then the client's own answer; BudgetError if that does
        not fit either.
        """
        best: tuple[CodedImage, float] | None = None
        tried: dict[int, int] = {}
        low, high = 0, len(levels)
        while low < high:
            middle = (low + high) // 2
            (found,) = self._code(view, detected, asked, levels[middle])
            tried[middle] = len(budget.write(found[0], input_shape))
            if tried[middle] <= budget.max_bytes:
                best, high = found, middle
            else:
                low = middle + 1
        for other in reversed(range(len(levels))):
            if best is not None or other in tried:
                continue
            (found,) = self._code(view, detected, asked, levels[other])
            tried[other] = len(budget.write(found[0], input_shape))
            if tried[other] <= budget.max_bytes:
                best = found
        if best is None and asked is None and view.class_logits is not None:
            (answer,) = self._answers(view.class_logits, detected, 0.0, input_shape)
            if answer is not None and budget.holds(answer, input_shape):
                best = answer, 0.0
        if best is None:
            raise BudgetError(
                f"an image takes {min(tried.values())} bytes at the smallest rate, and max_bytes "
                f"is {budget.max_bytes}: allow more, or train for a larger rate weight"
            )
        return best

    def _answers(
        self,
        class_logits: Tensor,
        detected: Tensor,
        exit_confidence: float,
        input_shape: tuple[int, int],
    ) -> list[CodedImage | None]:
        """For each image the client's own answer, None where it is less sure than that.

        None too where a segmentation is active: no class answers that.
        """
        limit = self.spec.model.max_active_tasks
        classless = torch.tensor([not task.classes for task in self.spec.tasks])
        active = select_mask(detected, self.mask_threshold, limit).cpu()
        needed = (active & classless).any(dim=1).tolist()
        named = torch.softmax(class_logits.float(), dim=1)[:, :-1].max(dim=1)
        found: list[CodedImage | None] = []
        for row, (sure, index) in enumerate(
            zip(named.values.tolist(), named.indices.tolist(), strict=True)
        ):
            if sure < exit_confidence or needed[row]:
                found.append(None)
                continue
            owners = [k for k, task in enumerate(self.spec.tasks) if index in task.classes]
            task = max(owners, key=lambda k: float(detected[row, k]))
            mask = tuple(k == task for k in range(len(self.spec.tasks)))
            label = self.spec.tasks[task].classes.index(index)
            confidence, said = None, sure
            if self._own_answers is not None:
                own = self._own_answers(class_logits[[row]].cpu(), torch.tensor([task]))
                confidence, said = int(own.level), float(detected[row, task])
            levels = (quantise_log2(said),) if self.spec.model.send_probabilities else None
            nothing = np.zeros(self.stream_spec.latent_shape(input_shape), np.int32)
            field = TaskField(mask, task, levels)
            found.append(CodedImage(field, nothing, label, confidence, has_latent=False))
        return found

    def _code(
        self, view: View, detected: Tensor, asked: Tensor | None, level: int
    ) -> Iterator[tuple[CodedImage, float]]:
        """Task field and symbols of each image, and the estimate of the latent's bits."""
        mask = asked
        if mask is None:
            limit = self.spec.model.max_active_tasks
            mask = select_mask(detected, self.mask_threshold, limit)
        primary = primary_task(detected, mask)
        everyone = torch.full((len(detected),), level, device=detected.device)
        shares = shares_of(everyone, self.spec.num_rates)
        latent = self.client.encode(view, detected if asked is None else asked.float(), shares)
        bits = [float("nan")] * len(detected)
        if self.estimate is not None:
            bits = self.estimate(latent, mask, primary, shares).tolist()
        sends = self.spec.model.send_probabilities and asked is None
        maps = to_symbols(latent.float().cpu().numpy())
        masks, probabilities = mask.cpu().numpy(), detected.cpu().numpy()
        said = [(None, None)] * len(detected)
        if self._own_answers is not None and asked is None:
            assert view.class_logits is not None
            own = self._own_answers(view.class_logits.cpu(), primary.cpu())
            said = [
                (label, level) if label >= 0 else (None, None)
                for label, level in zip(own.label.tolist(), own.level.tolist(), strict=True)
            ]
        for i, first in enumerate(primary.tolist()):
            active = masks[i]
            levels = tuple(quantise_log2(float(p)) for p in probabilities[i][active])
            field = TaskField(tuple(active.tolist()), first, levels if sends else None)
            yield CodedImage(field, maps[i], *said[i], rate_level=level), bits[i]


def _rows_of(view: View, rows: list[int]) -> View:
    classes = view.class_logits
    return View(
        view.stem[rows],
        view.detected[rows],
        view.logits[rows],
        None if classes is None else classes[rows],
    )
