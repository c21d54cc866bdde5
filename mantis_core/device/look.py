"""What a client makes of images before a stream is written: task fields, answers and symbols.

Shapes: B batch, K tasks, n classes, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.coder import to_symbols
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.task_field import TaskField, quantise_log2
from mantis_core.bitstream.wire import CodedImage
from mantis_core.device.facts import ClientFacts
from mantis_core.device.requests import (
    Budget,
    Tasks,
    Way,
    active_tasks,
    asked_levels,
    asked_tasks,
    check_asks,
    check_exit,
    is_array,
    with_only_task,
)
from mantis_core.errors import BudgetError

EDGES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Between the levels of confidence: a probability below the first one is level 0."""

_EDGES = np.array(EDGES, np.float32)

Floats = NDArray[np.float32]
Named = tuple[str, ...] | None


class Glimpse(NamedTuple):
    """What a client's detector says of images, and what its encoder starts from.

    Probabilities of tasks (B, K); of classes and "none of them" (B, n + 1), None of a detector that
    names tasks alone. `features` are the network's own.
    """

    probabilities: Floats
    classes: Floats | None
    features: Any


class Latents(NamedTuple):
    """Latents (B, C, h, w), not rounded, and how probable the client holds each label of each task,
    one task after the other (B, labels); None without exit heads."""

    latent: Floats
    answers: Floats | None


class Network(Protocol):
    """A client's networks, in torch or in onnxruntime."""

    @property
    def alone(self) -> bool:
        """Whether images pass one by one. Kernels round differently for other batch sizes, but the
        symbols of an image must not depend on the images beside it."""

    def see(self, images: Any) -> Glimpse:
        """uint8 images (B, 3, H, W) through stem and detector."""

    def code(self, features: Any, rows: Sequence[int], condition: Floats, level: int) -> Latents:
        """Images of a glimpse, by their rows, through the encoder.

        `condition` is (rows, K): p, or 1 for the tasks that are asked for.
        """


@dataclass(frozen=True, eq=False)
class Seen:
    """What the client made of one image. probabilities are the detector's (K,).

    `client_class` is the class that its detector gives, -1 where that names tasks alone. `latent`
    (C, h, w) is what was rounded to the image's symbols, None where none are sent.
    """

    image: CodedImage
    input_shape: tuple[int, int]
    probabilities: Floats
    client_class: int = -1
    latent: Floats | None = None


class Rounded(NamedTuple):
    """An image as it is to be coded, with its latent; None where the client answers itself.

    `own` is the client's own label for the one task that is asked for and its probability, None
    where it has no exit heads or another number of tasks is asked for.
    """

    image: CodedImage
    latent: Floats | None
    own: tuple[int, float] | None = None


class Looker:
    """The client's networks at work on images. Each runs once for an image, however it is coded."""

    def __init__(
        self,
        facts: ClientFacts,
        network: Network,
        mask_threshold: float,
        stream_spec: StreamSpec,
    ) -> None:
        self.facts, self.network, self.stream_spec = facts, network, stream_spec
        self.mask_threshold = mask_threshold

    def look(self, images: Any, ways: Sequence[Way]) -> Iterator[tuple[Seen, ...]]:
        """Task field and symbols of each of `images` (B, 3, H, W), once for each of `ways`.

        Raises ModelError for a way that this model does not have.
        """
        facts = self.facts
        ways = [with_only_task(facts, way) for way in ways]
        asked: list[NDArray[np.bool_] | None] = []
        levels = []
        for way in ways:
            check_asks(facts, way.tasks)
            own = None if way.tasks is None else asked_tasks(facts, way.tasks, len(images))
            asked.append(own)
            check_exit(facts, way.exit_confidence)
            most = None if way.budget is None else way.budget.max_bytes
            levels.append(asked_levels(facts, way.level, most))
        step = 1 if self.network.alone else max(1, len(images))
        for first in range(0, len(images), step):
            rows = slice(first, first + step)
            theirs = [None if tasks is None else tasks[rows] for tasks in asked]
            sight = _Sight(self, images[rows])
            yield from zip(*map(sight.coded, ways, theirs, levels), strict=True)


class _Sight:
    """What a client's networks say of a batch of images, and all that was made of it so far."""

    def __init__(self, looker: Looker, images: Any) -> None:
        self.looker, self.facts = looker, looker.facts
        self.shape = (int(images.shape[2]), int(images.shape[3]))
        self.detected, self.classes, self.features = looker.network.see(images)
        self._named, self._sure = [-1] * len(images), [0.0] * len(images)
        if self.classes is not None:
            own = self.classes[:, :-1]
            self._named = own.argmax(axis=1).tolist()
            self._sure = own.max(axis=1).tolist()
        self._known: dict[tuple[int, Named], dict[int, Rounded]] = {}  # level and tasks, row

    def coded(self, way: Way, asked: NDArray[np.bool_] | None, levels: range) -> list[Seen]:
        """The images as `way` says, at the first of `levels`, or at what its budget allows."""
        count, budget = len(self.detected), way.budget
        own: list[CodedImage | None] = [None] * count
        if way.exit_confidence is not None and asked is None and self.classes is not None:
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
            seen.append(Seen(image, self.shape, self.detected[row], self._named[row], latent))
        return seen

    def _fitted(
        self,
        row: int,
        tasks: Tasks,
        asked: NDArray[np.bool_] | None,
        levels: range,
        budget: Budget,
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
        if best is None and asked is None and self.classes is not None:
            answer = self._answer(row, 0.0)
            if answer is not None and budget.holds(answer, self.shape):
                best = Rounded(answer, None)
        if best is None:
            raise BudgetError(
                f"an image takes {min(tried.values())} bytes at the smallest rate, and max_bytes "
                f"is {budget.max_bytes}: allow more, or train for a larger rate weight"
            )
        return best

    def _active(self, row: int) -> NDArray[np.bool_]:
        limit = self.facts.max_active_tasks
        return active_tasks(self.detected[row], self.looker.mask_threshold, limit)

    def _answer(self, row: int, exit_confidence: float) -> CodedImage | None:
        """The client's own answer to an image, None where it is less sure than that.

        None too where a segmentation is active: no class answers that.
        """
        sure, index = self._sure[row], self._named[row]
        if sure < exit_confidence:
            return None
        classes, p = self.facts.classes, self.detected[row]
        if any(on and not own for on, own in zip(self._active(row), classes, strict=True)):
            return None
        owners = [k for k, own in enumerate(classes) if index in own]
        task = max(owners, key=lambda k: float(p[k]))
        mask = tuple(k == task for k in range(len(classes)))
        confidence, said = None, sure
        if self.facts.sends_answer:
            _, confidence = self._beside(row, task)
            said = float(p[task])
        levels = (quantise_log2(said),) if self.facts.send_probabilities else None
        nothing = np.zeros(self.looker.stream_spec.latent_shape(self.shape), np.int32)
        field = TaskField(mask, task, levels)
        label = classes[task].index(index)
        return CodedImage(field, nothing, label, confidence, has_latent=False)

    def _beside(self, row: int, task: int) -> tuple[int | None, int | None]:
        """The client's label within a task and its level of confidence, None without labels."""
        own = sorted(self.facts.classes[task])
        if not own:
            return None, None
        assert self.classes is not None
        p = self.classes[row][own]
        best = int(p.argmax())
        level = int(np.searchsorted(_EDGES, p[best], side="right"))
        return self.facts.classes[task].index(own[best]), level

    def _exited(self, found: Rounded, exit_confidence: float) -> Rounded:
        """An image that is asked about as the client's own answer, where it is that sure."""
        if found.own is None or found.own[1] < exit_confidence:
            return found
        nothing = np.zeros_like(found.image.map)
        return Rounded(CodedImage(found.image.tasks, nothing, found.own[0], has_latent=False), None)

    def _rounded(
        self, rows: Sequence[int], tasks: Tasks, asked: NDArray[np.bool_] | None, level: int
    ) -> list[Rounded]:
        """Images by their rows at a level.

        What is detected, or asked for by name, is kept for the next way; `asked` (B, K) are the
        `tasks` of a way.
        """
        known: dict[int, Rounded] = {}
        if not is_array(tasks):
            names: Any = (tasks,) if isinstance(tasks, str) else tasks
            kept = None if names is None else tuple(names)
            known = self._known.setdefault((level, kept), known)
        missing = [row for row in rows if row not in known]
        if missing:
            known |= zip(missing, self._encoded(missing, asked, level), strict=True)
        return [known[row] for row in rows]

    def _encoded(
        self, rows: Sequence[int], asked: NDArray[np.bool_] | None, level: int
    ) -> Iterator[Rounded]:
        """Task field and symbols of images by their rows."""
        facts = self.facts
        condition = self.detected[rows] if asked is None else asked[rows].astype(np.float32)
        latents, answers = self.looker.network.code(self.features, rows, condition, level)
        sends = facts.send_probabilities and asked is None
        for i, (row, symbols) in enumerate(zip(rows, to_symbols(latents), strict=True)):
            p = self.detected[row]
            active = self._active(row) if asked is None else asked[row]
            first = int(np.where(active, p, -1.0).argmax())
            levels = tuple(quantise_log2(float(own)) for own in p[active]) if sends else None
            field = TaskField(tuple(active.tolist()), first, levels)
            said: tuple[int | None, int | None] = (None, None)
            if facts.sends_answer and asked is None:
                said = self._beside(row, first)
            mine = None
            if answers is not None and active.sum() == 1:
                mine = self._own_label(answers[i], first)
            yield Rounded(CodedImage(field, symbols, *said, rate_level=level), latents[i], mine)

    def _own_label(self, answers: Floats, task: int) -> tuple[int, float] | None:
        """The best label of a task and its probability; None for a task without labels."""
        labels = self.facts.labels
        before, count = sum(labels[:task]), labels[task]
        if not count:
            return None
        own = answers[before : before + count]
        return int(own.argmax()), float(own.max())
