"""A camera in front of a service: images to messages, and what the service answers.

What the service asks changes what the camera sends, from the next image on.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from mantis_core.device.files import FilesError
from mantis_core.device.requests import named_tasks
from mantis_core.device.sessions import ClientSession
from mantis_core.errors import BudgetError
from mantis_core.pixels import ImageError
from pipelines.serving.app import HELLO

TIMEOUT_S = 30
UNTOLD: Any = object()
"""Of an image whose reply did not say what is asked: what was asked before holds."""


class ServiceError(RuntimeError):
    """A service cannot be reached or does not let the camera in."""

    exit_code = 1


class Frame(NamedTuple):
    """An image that the camera takes: its name for people, and what reads its file's bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Wanted:
    """What each image is coded for. `tasks` hold until the service asks for others."""

    tasks: tuple[str, ...] | None = None
    level: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Shot:
    """One image: what was asked, what it took, what came back; or why nothing was sent."""

    file: str
    tasks: tuple[str, ...] | None
    wire_bytes: int
    encode_ms: float
    reply_ms: float
    answers: list[dict[str, Any]]
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The shot as JSON values."""
        own = dict(self.__dict__)
        own["tasks"] = None if self.tasks is None else list(self.tasks)
        return own

    def line(self) -> str:
        """The shot as a person reads it."""
        if self.error:
            return f"{self.file}  {self.error}"
        said = "; ".join(
            ", ".join(
                f"{task} {answer.get('label_names', {}).get(task, 'answered')}"
                for task in answer.get("tasks", ())
            )
            for answer in self.answers
        )
        asked = "detected" if self.tasks is None else ", ".join(self.tasks)
        return (
            f"{self.file}  {self.wire_bytes} bytes for {asked}, {self.encode_ms:.0f} ms to encode, "
            f"{self.reply_ms:.0f} ms to the answer: {said}"
        )


class Link:
    """A connection to a service, opened anew where it breaks; a context that closes it."""

    def __init__(self, url: str, token: str = "") -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ServiceError(f"{url!r} is no address of a service: give http://HOST:PORT")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self.url, self._path = url, parts.path.rstrip("/")
        self._connection = kinds[parts.scheme](parts.hostname, port, timeout=TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and content of a reply; ServiceError where there is none."""
        for last in (False, True):
            try:
                self._connection.request(
                    method, self._path + path, body, {**self._headers, **(headers or {})}
                )
                reply = self._connection.getresponse()
                return reply.status, self._content(reply.status, reply.reason, reply.read())
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if last or not isinstance(error, ConnectionError):  # of a link that was cut
                    raise ServiceError(f"{self.url} does not answer: {error}") from error
        raise AssertionError("the second try returns or raises")

    def _content(self, status: int, reason: str, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            if status < http.client.BAD_REQUEST:
                raise ServiceError(f"{self.url} is no service of MANTiS")
            content = {"error": reason}
        return content


def shots(client: Any, link: Link, frames: Iterable[Frame], wanted: Wanted) -> Iterator[Shot]:
    """Sends images one by one, each for what the service asks then. `client` is a ClientCodec.

    Raises ServiceError where the service lets nothing in, ModelError for tasks it has not.
    """
    status, about = link.ask("GET", "/v1/models")
    if status != http.client.OK:
        raise ServiceError(f"{link.url}: {about.get('error', status)}")
    tasks = _next(client, about.get("request"), wanted.tasks)
    sessions: dict[tuple[bool, int], ClientSession] = {}
    for frame in frames:
        asked, own = tasks is not None, client.for_tasks(tasks)
        place = asked, own.family
        if place not in sessions:
            sessions[place] = own.open(requests=asked)
        shot, request = _shot(client, link, sessions[place], frame, tasks, wanted)
        yield shot
        if request is not UNTOLD:
            tasks = _next(client, request, wanted.tasks)


def _next(client: Any, request: Any, own: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What the next image is asked: by the service, else by the camera's user, else nothing."""
    if request:
        every = {name for own in client.families for name in own}
        known = tuple(str(task) for task in request if task in every)
        if known and client.for_tasks(known).facts.requests != "detect":
            return known
    if own is not None:
        return own
    named = named_tasks(client.facts, None)
    return None if named is None else tuple(named)


def _shot(
    client: Any,
    link: Link,
    session: ClientSession,
    frame: Frame,
    tasks: tuple[str, ...] | None,
    wanted: Wanted,
) -> tuple[Shot, Any]:
    name, began = frame.name, time.perf_counter()
    try:
        image = client.prepare_image(frame.read())
        (message,) = session.encode(
            image[None],
            None if tasks is None else list(tasks),
            level=wanted.level,
            max_bytes=wanted.max_bytes,
        )
    except (BudgetError, FilesError, ImageError) as error:
        return Shot(name, tasks, 0, 0.0, 0.0, [], str(error)), UNTOLD
    encoded = time.perf_counter()
    query = "" if tasks is None else "?" + urlencode([("task", task) for task in tasks])
    hello = base64.b64encode(session.hello).decode()
    status, content = link.ask("POST", f"/v1/messages{query}", message, {HELLO: hello})
    took = (1000 * (encoded - began), 1000 * (time.perf_counter() - encoded))
    if status != http.client.OK:
        refused = f"{status}: {content.get('error', content)}"
        return Shot(name, tasks, len(message), *took, [], refused), UNTOLD
    answers, request = content.get("answers"), content.get("request")
    if not isinstance(answers, list) or not isinstance(request, list | None):
        raise ServiceError(f"{link.url} is no service of MANTiS: its reply has no answers")
    return Shot(name, tasks, len(message), *took, answers), request
