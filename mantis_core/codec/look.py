"""What a client makes of images before a stream is written: task fields, answers and symbols.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mantis_core.bitstream.coder import to_symbols
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage
from mantis_core.codec.own_answer import ClientAnswers
from mantis_core.codec.requests import (
    Budget,
    Way,
    asked_levels,
    asked_tasks,
    check_asks,
    check_exit,
    check_images,
    primary_task,
    select_mask,
    with_only_task,
)
from mantis_core.codec.spec import ModelSpec
from mantis_core.errors import BudgetError
from mantis_core.networks.client import Client
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.detector import View
from mantis_core.networks.inference import one_thread, still
from mantis_core.networks.preprocessing import normalise

Tasks = str | Sequence[str] | Tensor | None
Named = tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Seen:
    """What the client made of one image. probabilities are the detector's (K,).

    `client_class` is the class that its detector gives, -1 where that names tasks alone. `latent`
    (C, h, w) is what was rounded to the image's symbols, None where none are sent.
    """

    image: CodedImage
    input_shape: tuple[int, int]
    probabilities: NDArray[np.float32]
    client_class: int = -1
    latent: Tensor | None = None


class Rounded(NamedTuple):
    """An image as it is to be coded, with its latent; None where the client answers itself.

    `own` is the client's own label for the one task that is asked for and its probability, None
    where it has no exit heads or another number of tasks is asked for.
    """

    image: CodedImage
    latent: Tensor | None
    own: tuple[int, float] | None = None


class Looker:
    """The client's networks at work on images. Each runs once for an image, however it is coded."""

    def __init__(
        self, spec: ModelSpec, client: Client, mask_threshold: Tensor, stream_spec: StreamSpec
    ) -> None:
        """`mask_threshold` is a scalar."""
        self.spec, self.client, self.stream_spec = spec, client, stream_spec
        self.mask_threshold = mask_threshold
        self.own_answers = None
        if spec.sends_answer:
            self.own_answers = ClientAnswers(spec.tasks, len(spec.classes))

    @torch.no_grad()
    def look(self, images: Tensor, ways: Sequence[Way]) -> Iterator[tuple[Seen, ...]]:
        """Task field and symbols of each of `images`, once for each of `ways`.

        On a CPU each image passes the network alone and on one thread. Kernels round differently
        for other batch sizes and numbers of threads, but the symbols of an image must not depend on
        the images beside it or on the machine's cores. Raises ModelError for images that are none
        and for a way that this model does not have.
        """
        check_images(images)
        ways = [with_only_task(self.spec, way) for way in ways]
        asked: list[Tensor | None] = []
        levels = []
        for way in ways:
            tasks = way.tasks
            check_asks(self.spec, tasks)
            if tasks is not None:
                tasks = asked_tasks(self.spec, tasks, len(images)).to(images.device)
            asked.append(tasks)
            check_exit(self.spec, way.exit_confidence)
            most = None if way.budget is None else way.budget.max_bytes
            levels.append(asked_levels(self.spec, way.level, most))
        if images.device.type != "cpu":
            yield from zip(*self._pass(images, ways, asked, levels), strict=True)
            return
        for row in range(len(images)):
            own = slice(row, row + 1)
            with one_thread():
                theirs = [None if tasks is None else tasks[own] for tasks in asked]
                seen = list(self._pass(images[own], ways, theirs, levels))
            yield tuple(image for (image,) in seen)

    def _pass(
        self,
        images: Tensor,
        ways: Sequence[Way],
        asked: Sequence[Tensor | None],
        levels: Sequence[range],
    ) -> Iterator[list[Seen]]:
        """For each way all images, which pass the networks together."""
        with still(self.client):
            sight = _Sight(self, images)
            for way, wanted, own_levels in zip(ways, asked, levels, strict=True):
                yield sight.coded(way, wanted, own_levels)


class _Sight:
    """What a client's networks say of a batch of images, and all that was made of it so far."""

    def __init__(self, looker: Looker, images: Tensor) -> None:
        self.looker, self.spec = looker, looker.spec
        self.shape = (int(images.shape[2]), int(images.shape[3]))
        self.view: View = looker.client(normalise(images))
        self.detected = torch.sigmoid(self.view.logits.float())
        self._probabilities = self.detected.cpu().numpy()
        self._named, self._sure = [-1] * len(images), [0.0] * len(images)
        if self.view.class_logits is not None:
            soft = torch.softmax(self.view.class_logits.float(), dim=1)
            self._sure, self._named = (best.tolist() for best in soft[:, :-1].max(dim=1))
        self._known: dict[tuple[int, Named], dict[int, Rounded]] = {}  # level and tasks, row

    def coded(self, way: Way, asked: Tensor | None, levels: range) -> list[Seen]:
        """The images as `way` says, at the first of `levels`, or at what its budget allows."""
        count, budget = len(self.detected), way.budget
        own: list[CodedImage | None] = [None] * count
        if way.exit_confidence is not None and asked is None and self.view.class_logits is not None:
            own = [self._answer(row, way.exit_confidence) for row in range(count)]
        if budget is not None:
            own = [a if a is None or budget.holds(a, self.shape) else None for a in own]
        rest = [row for row, answer in enumerate(own) if answer is None]
        if budget is None:
            found = self._rounded(rest, way.tasks, asked, levels[0])
        else:  # each image finds a level of its own
            found = [self._fitted(row, way.tasks, asked, levels, budget) for row in rest]
        if way.exit_confidence is not None:
            short = [self._exited(each, way.exit_confidence) for each in found]
            found = [
                said if budget is None or budget.holds(said.image, self.shape) else each
                for each, said in zip(found, short, strict=True)
            ]
        coded = dict(zip(rest, found, strict=True))
        seen = []
        for row, answer in enumerate(own):
            image, latent, _ = coded[row] if answer is None else Rounded(answer, None)
            seen.append(Seen(image, self.shape, self._probabilities[row], self._named[row], latent))
        return seen

    def _fitted(
        self, row: int, tasks: Tasks, asked: Tensor | None, levels: range, budget: Budget
    ) -> Rounded:
        """One image at a level that the budget holds, by bisection the lowest of `levels`.

        Sizes fall with the level, but for a byte or so between neighbours. If bisection finds none,
        those that it left out are tried, and then the client's own answer; BudgetError if that does
        not fit either.
        """
        best: Rounded | None = None
        tried: dict[int, int] = {}
        low, high = 0, len(levels)
        while low < high:
            middle = (low + high) // 2
            (found,) = self._rounded([row], tasks, asked, levels[middle])
            tried[middle] = len(budget.write(found.image, self.shape))
            if tried[middle] <= budget.max_bytes:
                best, high = found, middle
            else:
                low = middle + 1
        for other in reversed(range(len(levels))):
            if best is not None or other in tried:
                continue
            (found,) = self._rounded([row], tasks, asked, levels[other])
            tried[other] = len(budget.write(found.image, self.shape))
            if tried[other] <= budget.max_bytes:
                best = found
        if best is None and asked is not None:
            (found,) = self._rounded([row], tasks, asked, levels[-1])
            short = self._exited(found, 0.0)
            if short.latent is None and budget.holds(short.image, self.shape):
                best = short
        if best is None and asked is None and self.view.class_logits is not None:
            answer = self._answer(row, 0.0)
            if answer is not None and budget.holds(answer, self.shape):
                best = Rounded(answer, None)
        if best is None:
            raise BudgetError(
                f"an image takes {min(tried.values())} bytes at the smallest rate, and max_bytes "
                f"is {budget.max_bytes}: allow more, or train for a larger rate weight"
            )
        return best

    def _answer(self, row: int, exit_confidence: float) -> CodedImage | None:
        """The client's own answer to an image, None where it is less sure than that.

        None too where a segmentation is active: no class answers that.
        """
        sure, index = self._sure[row], self._named[row]
        if sure < exit_confidence:
            return None
        tasks, detected = self.spec.tasks, self.detected[[row]]
        assert self.view.class_logits is not None
        logits = self.view.class_logits[[row]]
        limit = self.spec.model.max_active_tasks
        active = select_mask(detected, self.looker.mask_threshold, limit)[0].tolist()
        if any(on and not task.classes for on, task in zip(active, tasks, strict=True)):
            return None
        owners = [k for k, task in enumerate(tasks) if index in task.classes]
        task = max(owners, key=lambda k: float(detected[0, k]))
        mask = tuple(k == task for k in range(len(tasks)))
        confidence, said = None, sure
        if self.looker.own_answers is not None:
            own = self.looker.own_answers(logits.cpu(), torch.tensor([task]))
            confidence, said = int(own.level), float(detected[0, task])
        levels = (quantise_log2(said),) if self.spec.model.send_probabilities else None
        nothing = np.zeros(self.looker.stream_spec.latent_shape(self.shape), np.int32)
        label = tasks[task].classes.index(index)
        field = TaskField(mask, task, levels)
        return CodedImage(field, nothing, label, confidence, has_latent=False)

    def _exited(self, found: Rounded, exit_confidence: float) -> Rounded:
        """An image that is asked about as the client's own answer, where it is that sure."""
        if found.own is None or found.own[1] < exit_confidence:
            return found
        nothing = np.zeros_like(found.image.map)
        return Rounded(CodedImage(found.image.tasks, nothing, found.own[0], has_latent=False), None)

    def _rounded(
        self, rows: Sequence[int], tasks: Tasks, asked: Tensor | None, level: int
    ) -> list[Rounded]:
        """Images by their rows at a level.

        What is detected, or asked for by name, is kept for the next way; `asked` (B, K) are the
        `tasks` of a way.
        """
        known: dict[int, Rounded] = {}
        if not isinstance(tasks, Tensor):
            names = (tasks,) if isinstance(tasks, str) else tasks
            kept = None if names is None else tuple(names)
            known = self._known.setdefault((level, kept), known)
        missing = [row for row in rows if row not in known]
        if missing:
            view, detected, wanted = self.view, self.detected, asked
            if len(missing) < len(detected):
                view, detected = _rows_of(view, missing), detected[missing]
                wanted = None if asked is None else asked[missing]
            known |= zip(missing, self._encoded(view, detected, wanted, level), strict=True)
        return [known[row] for row in rows]

    def _encoded(
        self, view: View, detected: Tensor, asked: Tensor | None, level: int
    ) -> Iterator[Rounded]:
        """Task field and symbols of each image of a view."""
        mask = asked
        if mask is None:
            limit = self.spec.model.max_active_tasks
            mask = select_mask(detected, self.looker.mask_threshold, limit)
        primary = primary_task(detected, mask)
        everyone = torch.full((len(detected),), level, device=detected.device)
        shares = shares_of(everyone, self.spec.num_rates)
        condition = detected if asked is None else asked.float()
        latent, exits = self.looker.client.code(view, condition, shares)
        sends = self.spec.model.send_probabilities and asked is None
        maps = to_symbols(latent.float().cpu().numpy())
        masks, probabilities = mask.cpu().numpy(), detected.cpu().numpy()
        said = [(None, None)] * len(detected)
        if self.looker.own_answers is not None and asked is None:
            assert view.class_logits is not None
            own = self.looker.own_answers(view.class_logits.cpu(), primary.cpu())
            said = [
                (label, sure) if label >= 0 else (None, None)
                for label, sure in zip(own.label.tolist(), own.level.tolist(), strict=True)
            ]
        own_labels = [_labelled(logits) for logits in exits or ()]
        for i, first in enumerate(primary.tolist()):
            active = masks[i]
            levels = tuple(quantise_log2(float(p)) for p in probabilities[i][active])
            field = TaskField(tuple(active.tolist()), first, levels if sends else None)
            mine = own_labels[first][i] if active.sum() == 1 and own_labels else None
            image = CodedImage(field, maps[i], *said[i], rate_level=level)
            yield Rounded(image, latent[i], mine)


def _labelled(logits: Tensor) -> list[tuple[int, float] | None]:
    """The best label of each image and its probability, from logits (B, n); None without labels."""
    if not logits.shape[1]:
        return [None] * len(logits)
    best = torch.softmax(logits, dim=1).max(dim=1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _rows_of(view: View, rows: list[int]) -> View:
    classes = view.class_logits
    return View(
        view.stem[rows],
        view.detected[rows],
        view.logits[rows],
        None if classes is None else classes[rows],
    )
