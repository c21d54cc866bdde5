"""Sessions of the two halves: what they agree on is sent once, then an image costs little more
than its latent.

    client = load_client("client/").open(request="car")
    server = load_server("server/").open(client.hello, request="car")
    answers = server.decode(client.encode(images))
    client.request = server.request = ["road", "sky"]  # from the next image on

Shapes: B batch, K tasks, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.session import Session, read_hello, write_hello
from mantis_core.bitstream.wire import CodedImage, Unpacked, read_message, write_message
from mantis_core.device.facts import ClientFacts
from mantis_core.device.look import Seen
from mantis_core.device.requests import (
    Budget,
    Tasks,
    asked_tasks,
    check_asks,
    check_family,
    listed_bytes,
)
from mantis_core.errors import ModelError


class _Half(Protocol):
    """What both halves of a codec know of its streams."""

    facts: ClientFacts
    tables: TableSet
    stream_spec: StreamSpec
    families: tuple[tuple[str, ...], ...]
    family: int


class _Client(_Half, Protocol):
    """What a session takes of a `ClientCodec`."""

    def check_images(self, images: Any) -> None: ...

    def look(
        self,
        images: Any,
        tasks: Tasks = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        budget: Budget | None = None,
    ) -> Iterator[Seen]: ...


Answer = TypeVar("Answer")


class _Server(_Half, Protocol[Answer]):
    """What a session takes of a `ServerCodec`."""

    def answer(self, streams: Iterable[Unpacked]) -> list[Answer]: ...


class _End:
    """One end of a session. A session carries streams of one id: tasks of another are refused."""

    session: Session
    _half: _Half
    _request: str | Sequence[str] | None

    @property
    def request(self) -> str | Sequence[str] | None:
        """The tasks that the server asks for, None where every call names its own."""
        return self._request

    @request.setter
    def request(self, tasks: str | Sequence[str] | None) -> None:
        """Raises ModelError in a session without requests, and for tasks the model has not, or
        sends in streams of another id."""
        if tasks is not None:
            self._check(tasks)
            check_asks(self._half.facts, tasks)
            asked_tasks(self._half.facts, tasks, 1)
        self._request = tasks

    def _check(self, tasks: Tasks) -> None:
        if self.session.requests == (tasks is None):
            raise ModelError(
                "this is a session of requests: name the tasks that are asked for"
                if self.session.requests
                else "in this session tasks are detected: open one with requests=True to ask for "
                "some"
            )
        check_family(self._half.families, self._half.family, tasks)


class ClientSession(_End):
    """The client's end: images of one shape to messages, one each.

    `hello` opens the session; send it once, before any message.
    """

    def __init__(
        self,
        codec: _Client,
        *,
        input_shape: tuple[int, int] | None = None,
        requests: bool | None = None,
        request: str | Sequence[str] | None = None,
    ) -> None:
        """Images have `input_shape` (H, W), None being the model's own.

        With `requests` the server asks for tasks, and messages do not repeat them; None is what the
        model was made for: a model that is asked has no other sessions. `request` names the tasks
        that it asks for until `request` is set anew. Raises BitstreamError for a model of format
        version 1, and for images that no stream may hold, ModelError for tasks it has not.
        """
        if requests is None and request is not None:
            requests = True
        self.codec, self.session = codec, session_of(codec, input_shape, requests=requests)
        self._half, self.request = codec, request
        self.hello = write_hello(self.session, codec.stream_spec)

    def encode(
        self,
        images: Any,
        tasks: Tasks = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one message each; arguments as ClientCodec.encode.

        `tasks` are what the server has asked for, in a session of requests alone; None stands for
        `request`.
        """
        tasks = self.request if tasks is None else tasks
        self._check(tasks)
        self.codec.check_images(images)
        shape = (int(images.shape[-2]), int(images.shape[-1]))
        if shape != self.session.input_shape:
            raise ModelError(
                f"images have {shape[0]}x{shape[1]} pixels; those of this session have "
                f"{self.session.input_shape[0]}x{self.session.input_shape[1]}: open another one"
            )
        budget = None if max_bytes is None else Budget(max_bytes, self._message)
        return [
            self._message(seen.image, seen.input_shape)
            for seen in self.codec.look(
                images, tasks, exit_confidence=exit_confidence, level=level, budget=budget
            )
        ]

    def _message(self, image: CodedImage, _: tuple[int, int]) -> bytes:
        codec = self.codec
        return write_message(image, self.session, self.hello, codec.tables, codec.stream_spec).data


class ServerSession(_End, Generic[Answer]):
    """The server's end: messages to answers."""

    def __init__(
        self, codec: _Server[Answer], hello: bytes, *, request: str | Sequence[str] | None = None
    ) -> None:
        """`request` names the tasks that are asked for until `request` is set anew.

        Raises BitstreamError, with a reason, for a hello that this model cannot serve, ModelError
        for tasks it has not.
        """
        self.codec, self.hello = codec, bytes(hello)
        self.session = read_hello(self.hello, codec.stream_spec)
        self._half, self.request = codec, request

    def decode(self, messages: Iterable[bytes], tasks: Tasks = None) -> list[Answer]:
        """Messages to one answer each, in order; arguments and errors as `read`."""
        return self.codec.answer(self.read(messages, tasks))

    def read(self, messages: Iterable[bytes], tasks: Tasks = None) -> Iterator[Unpacked]:
        """What messages hold, in order, each read when it is taken.

        `tasks` are what was asked for, in a session of requests alone: names, or a bool array
        (B, K) with a row for each message; None stands for `request`. Raises BitstreamError for the
        first message that is damaged, of another session or a reply to another request, ModelError
        for what is no list of byte strings.
        """
        tasks = self.request if tasks is None else tasks
        self._check(tasks)
        messages = listed_bytes(messages, "messages")
        asked: list[tuple[bool, ...]] = [()] * len(messages)
        if tasks is not None:
            rows = asked_tasks(self.codec.facts, tasks, len(messages)).tolist()
            asked = [tuple(row) for row in rows]
        tables, spec = self.codec.tables, self.codec.stream_spec
        return (
            read_message(data, self.session, self.hello, tables, spec, wanted)
            for data, wanted in zip(messages, asked, strict=True)
        )


def session_of(
    codec: _Client,
    input_shape: tuple[int, int] | None = None,
    *,
    requests: bool | None = None,
) -> Session:
    """What a session with this client says of every message."""
    if requests is None:
        requests = codec.facts.requests == "asked"
    return Session(
        tuple(input_shape or codec.facts.image_size),  # type: ignore[arg-type]
        with_levels=codec.facts.send_probabilities and not requests,
        with_answers=codec.facts.sends_answer and not requests,
        requests=requests,
    )
