"""The server half at work: streams to answers. Needs tables, decoders and tails alone.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.container import ID_PLACE
from mantis_core.bitstream.task_field import log_probabilities
from mantis_core.bitstream.wire import CodedImage, Unpacked, read_stream
from mantis_core.codec.answer import Answer
from mantis_core.codec.own_answer import Fusion, answers_to
from mantis_core.codec.spec import AddedTask, Ids, ModelSpec
from mantis_core.device.requests import family_of, listed_bytes
from mantis_core.device.sessions import ServerSession
from mantis_core.errors import ModelError
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.extension import extended_server
from mantis_core.networks.inference import still
from mantis_core.networks.server import AnswersLater, JointDecision, Server, decided
from mantis_core.tasks import TaskSpec, parents_first


class ServerCodec:
    """Turns streams into answers. Holds no stem, detector or encoder and no weight of one.

    `extensions` are servers of the same networks for tasks that came later and have streams of
    their own; `families` and `family` are as those of `DeviceClient`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        server: Server,
        joint: JointDecision | None,
        tables: TableSet,
        ids: Ids,
        *,
        fusion: Fusion | None = None,
        answer_counts: Tensor | None = None,
        extensions: Sequence[ServerCodec] = (),
    ) -> None:
        """`fusion` and `answer_counts` are there for a model whose client sends its answers."""
        self.spec, self.server, self.joint, self.tables = spec, server, joint, tables
        self.ids, self.fusion, self.facts = ids, fusion, spec.facts
        self.stream_spec = spec.stream_spec(ids.stream, answer_counts)
        self.extensions = tuple(extensions)
        self.families: tuple[tuple[str, ...], ...] = spec.families
        self.family = 0
        for number, own in enumerate(extensions, start=1):
            own.families, own.family = self.families, number

    @torch.no_grad()
    def decode(
        self, streams: Iterable[bytes], *, added: Sequence[str] | None = None
    ) -> list[Answer]:
        """Streams to one answer per image, in order; only each image's active tasks are decoded.

        A task with a parent that is active too is decoded where the answer to that admits it. Of
        the tasks that were added to the server those named in `added` are answered, None being all.

        A stream of several images shares its bytes equally among their answers. Raises
        BitstreamError for the first stream that this model did not make, ModelError for what is no
        list of byte strings and for a task that was not added.
        """
        found = listed_bytes(streams, "streams")
        return self.answer(map(self.read, found), added=added)

    def read(self, stream: bytes) -> Unpacked:
        """What a stream holds; BitstreamError if no part of this model made it."""
        own = self._of(stream[ID_PLACE])
        return read_stream(stream, own.tables, own.stream_spec)

    @torch.no_grad()
    def answer(
        self, streams: Iterable[Unpacked], *, added: Sequence[str] | None = None
    ) -> list[Answer]:
        """What was read of streams or messages to one answer per image, in order; see `decode`.

        However many there are, latents of about `max_total_pixels` are held at a time.
        """
        later = self._later(added)
        answers: list[Answer] = []
        group: list[Unpacked] = []
        pixels = 0
        for stream in streams:
            if group and stream.stream_id != group[0].stream_id:
                answers += self._answer_group(group, later)
                group, pixels = [], 0
            _, height, width = self.stream_spec.latent_shape(stream.input_shape)
            own = len(stream.images) * height * width * self.stream_spec.stride**2
            if group and pixels + own > self.stream_spec.max_total_pixels:
                answers += self._answer_group(group, later)
                group, pixels = [], 0
            group.append(stream)
            pixels += own
        return answers + self._answer_group(group, later)

    def request_for(self, names: str | Sequence[str]) -> list[str]:
        """What a client has to be asked for so that the tasks `names` can be answered.

        A task that the client knows stands for itself, one that was added to the server for those
        it is answered through. Raises ModelError for a task that this server does not answer, and
        for tasks that are sent in separate streams.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        added = tuple(each.task.name for each in self.spec.added)
        if self.extensions:
            number = family_of(((*self.spec.task_names, *added), *self.families[1:]), wanted)
            if number:
                return self.extensions[number - 1].request_for(wanted)
        own = self.spec.task_names
        through = {each.task.name: each.through or own for each in self.spec.added}
        if unknown := [name for name in wanted if name not in (*own, *through)]:
            has = ", ".join(each.name for each in self.spec.every_task)
            raise ModelError(f"tasks {unknown} asked for; this server answers {has}")
        asked = {task for name in wanted for task in through.get(name, (name,))}
        return [name for name in own if name in asked]

    def _later(self, names: Sequence[str] | None) -> list[AddedTask]:
        known = {own.task.name: own for own in self.spec.added}
        if unknown := [name for name in names or () if name not in known]:
            has = ", ".join(known) or "none"
            raise ModelError(f"tasks {unknown} were not added to this server; added are {has}")
        return [own for name, own in known.items() if names is None or name in names]

    def _answer_group(
        self, streams: Sequence[Unpacked], later: Sequence[AddedTask]
    ) -> list[Answer]:
        if streams and (owner := self._of(streams[0].stream_id)) is not self:
            return owner._answer_group(streams, [])
        images: list[CodedImage] = []
        shapes: list[tuple[int, int]] = []
        sizes: list[tuple[float, float]] = []
        for stream in streams:
            count = len(stream.images)
            wire_bytes = stream.wire_bytes if count == 1 else stream.wire_bytes / count
            images += stream.images
            shapes += [stream.input_shape] * count
            sizes += [(wire_bytes, stream.payload_bytes / count)] * count
        found = {i: self._read_answer(im) for i, im in enumerate(images) if not im.has_latent}
        for shape in sorted(set(shapes)):
            rows = [i for i, own in enumerate(shapes) if own == shape and i not in found]
            if rows:
                group = self._decode_group([images[i] for i in rows], shape, later)
                found |= zip(rows, group, strict=True)
        answers = []
        for i, (wire_bytes, payload_bytes) in enumerate(sizes):
            answers.append(
                Answer(
                    **found[i],
                    wire_bytes=wire_bytes,
                    payload_bytes=payload_bytes,
                    model_id=self.ids.model.hex(),
                )
            )
        return answers

    def open(
        self, hello: bytes, *, request: str | Sequence[str] | None = None
    ) -> ServerSession[Answer]:
        """The other end of the session that began with `hello`, see `ServerSession`.

        The id in the hello says whether it carries tasks of an extension.
        """
        return ServerSession(self._of(hello[ID_PLACE]), hello, request=request)

    def _of(self, stream_id: bytes) -> ServerCodec:
        """The part of this model whose streams have an id; this one for ids of another model."""
        known = {own.ids.stream: own for own in self.extensions}
        return known.get(bytes(stream_id), self)

    def describe(self) -> dict[str, Any]:
        """Size of the server."""
        return {"server_parameters": sum(p.numel() for p in self.server.parameters())}

    def _read_answer(self, image: CodedImage) -> dict[str, Any]:
        """The answer that the client has sent; nothing is decoded."""
        assert image.label is not None
        task, label = self.spec.tasks[image.tasks.primary], image.label
        about = math.exp(log_probabilities(image.tasks)[image.tasks.primary])
        sure = about
        if image.confidence is not None:
            assert self.fusion is not None
            sure = float(self.fusion.accuracy[image.confidence])
        index = task.classes[label] if self.spec.single_class else -1
        told = image.confidence is not None or image.tasks.levels is not None
        return {
            "tasks": (task.name,),
            "task_probability": {task.name: about},
            "labels": {task.name: label},
            "label_names": {task.name: task.labels[label]} if task.labels else {},
            "label_probability": {task.name: sure} if told else {},
            "class_index": index,
            "class_name": self.spec.class_names[index] if index >= 0 else None,
            "class_probability": sure if index >= 0 else 0.0,
            "segmentation": {},
            "answered": True,
        }

    def _decode_group(
        self,
        images: Sequence[CodedImage],
        shape: tuple[int, int],
        later: Sequence[AddedTask],
    ) -> list[dict[str, Any]]:
        """Answers for images of one shape, without the stream's sizes."""
        device = next(self.server.parameters()).device
        mask = np.array([image.tasks.mask for image in images], bool)
        log_p = torch.tensor([log_probabilities(image.tasks) for image in images]).to(device)
        maps = torch.from_numpy(np.stack([image.map for image in images])).to(device).float()
        with still(self.server):
            latent = maps.contiguous(memory_format=torch.channels_last)
            level = torch.tensor([image.rate_level for image in images], device=device)
            shares = shares_of(level, self.spec.num_rates)
            split, last = self.server.features(latent, shares)
            outputs: dict[str, Tensor] = {}
            answers: dict[str, dict[int, Any]] = {}
            for k in parents_first(self.spec.tasks):
                task = self.spec.tasks[k]
                rows = np.flatnonzero(mask[:, k])
                rows = rows[self._admitted(task, mask[rows], rows, answers)]
                own = self._task_output(k, rows, split, last, shape)
                if self.fusion is not None and task.is_classification and len(rows):
                    said = answers_to(k, [images[row] for row in rows], device)
                    mine = None if shares is None else shares[torch.from_numpy(rows).to(device)]
                    own = self.fusion(own, said, mine)
                places = torch.from_numpy(rows).to(device)
                outputs[task.name] = _at_rows(own, places, len(images))
                answers[task.name] = dict(zip(rows.tolist(), _said(task, own), strict=True))
            decisions = [(-1, 0.0)] * len(images)
            if self.joint is not None:
                scores = self.joint(outputs, log_p)
                sure = torch.softmax(scores, dim=1).max(dim=1).values
                decisions = list(zip(decided(scores).tolist(), sure.tolist(), strict=True))
            about = self._answer_later(later, mask, answers, split, last, shape)
        for row, sent in enumerate(log_p.exp().tolist()):
            for name, p in zip(self.spec.task_names, sent, strict=True):
                about.setdefault(name, {})[row] = p
        return [self._answer(i, answers, about, decisions[i]) for i in range(len(images))]

    def _answer_later(
        self,
        later: Sequence[AddedTask],
        mask: NDArray[np.bool_],
        answers: dict[str, dict[int, Any]],
        split: Tensor,
        last: Tensor,
        shape: tuple[int, int],
    ) -> dict[str, dict[int, float]]:
        """Answers the tasks that were added, into `answers`.

        Returns by name and row how probable it is that an image is about them.
        """
        about: dict[str, dict[int, float]] = {}
        for own in later:
            needed = [self.spec.task_names.index(name) for name in own.through]
            rows = np.flatnonzero(mask[:, needed].all(axis=1))
            rows = rows[self._admitted(own.task, mask[rows], rows, answers)]
            if not len(rows):
                continue
            places = torch.from_numpy(rows).to(last.device)
            found = self.server.answer(own.task, split[places], last[places], shape).float()
            mine = 1 - found[:, -1].exp() if own.task.is_classification else torch.ones(len(rows))
            about[own.task.name] = dict(zip(rows.tolist(), mine.tolist(), strict=True))
            said = _said(own.task, found)
            answers[own.task.name] = dict(zip(rows.tolist(), said, strict=True))
        return about

    def _admitted(
        self,
        task: TaskSpec,
        mask: NDArray[np.bool_],
        rows: NDArray[np.int64],
        answers: Mapping[str, Mapping[int, Any]],
    ) -> NDArray[np.bool_]:
        """Which of the images `rows` (N,), active in `mask` (N, K), a task is answered for.

        Those whose answer to the task's parent is the label of its name, and those without that.
        """
        if not task.parent:
            return np.ones(len(rows), dtype=bool)
        names = [each.name for each in self.spec.answered]
        place = names.index(task.parent)
        own = self.spec.answered[place].labels.index(task.name)
        said = answers.get(task.parent, {})
        found = np.array([said.get(row, (-1,))[0] == own for row in rows.tolist()], dtype=bool)
        if place < mask.shape[1]:
            return np.logical_or(~mask[:, place], found)
        return np.logical_or([row not in said for row in rows.tolist()], found)

    def _task_output(
        self,
        k: int,
        rows: NDArray[np.int64],
        split: Tensor,
        last: Tensor,
        shape: tuple[int, int],
    ) -> Tensor:
        """One task's output for the images `rows` (N,) in which it is active: (N, ...)."""
        task = self.spec.tasks[k]
        if not len(rows):
            size = (task.num_classes + 1,) if task.is_classification else (task.num_classes, *shape)
            return torch.empty((0, *size), device=last.device)
        places = torch.from_numpy(rows).to(last.device)
        return self.server.answer(task, split[places], last[places], shape).float()

    def _answer(
        self,
        i: int,
        answers: Mapping[str, Mapping[int, Any]],
        about: Mapping[str, Mapping[int, float]],
        decision: tuple[int, float],
    ) -> dict[str, Any]:
        """One image's answer, from those and `about` of all rows, the tasks' probabilities.

        `decision` is its class and the class's probability, -1 for none.
        """
        active = [task for task in self.spec.answered if i in answers.get(task.name, {})]
        named = [task for task in active if task.is_classification]
        labels = {t.name: answers[t.name][i][0] for t in named}
        sure = {t.name: answers[t.name][i][1] for t in named}
        for k in parents_first(self.spec.answered):  # a child's label is as sure as all above it
            task = self.spec.answered[k]
            if task.name in sure:
                sure[task.name] *= sure.get(task.parent, 1.0)
        index, class_sure = decision
        return {
            "tasks": tuple(task.name for task in active),
            "task_probability": {task.name: about[task.name][i] for task in active},
            "labels": labels,
            "label_names": {t.name: t.labels[labels[t.name]] for t in named if t.labels},
            "label_probability": sure,
            "class_index": index,
            "class_name": self.spec.class_names[index] if index >= 0 else None,
            "class_probability": class_sure if index >= 0 else 0.0,
            "segmentation": {t.name: answers[t.name][i] for t in active if not t.is_classification},
        }


def extension_server(
    spec: ModelSpec, number: int, server: Server, own: AnswersLater, tables: TableSet, ids: Ids
) -> ServerCodec:
    """The server of an extension of the codec with this `spec` and `server`, sharing its weights.

    `ids` are those of the extension's streams and of the whole model.
    """
    return ServerCodec(spec.extended(number), extended_server(server, own), None, tables, ids)


def _at_rows(own: Tensor, rows: Tensor, count: int) -> Tensor:
    """Values (N, ...) of the images `rows` (N,) among all images (B, ...), -inf at the others."""
    if len(own) == count:
        return own
    return own.new_full((count, *own.shape[1:]), -math.inf).index_copy(0, rows, own)


def _said(task: TaskSpec, own: Tensor) -> list[Any]:
    """What each of a task's outputs (N, ...) says: its label and the probability, or its mask."""
    if task.is_classification:
        best = own[:, :-1].max(dim=1)
        return list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))
    return list(own.argmax(dim=1).to(torch.uint8).cpu().numpy())
