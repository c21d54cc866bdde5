"""The service over HTTP: what is let in, and who answers. Knows no Ray.

    POST /v1/answers             a stream, as `mantis encode` writes it
    POST /v1/messages?task=NAME  a message of a session; its hello in the header Mantis-Hello
    POST /v1/streams?model=ID    a photograph, for callers without a client: replies its stream
    GET  /v1/models              the models that answer, and what is asked now
    PUT  /v1/request             what cameras shall be asked from now on
    GET  /healthz, /metrics      for whoever watches the service
    GET  /                       the page, see `pages.py`

Streams are refused here, by their checksum and id, before a model sees them.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from mantis_core.bitstream.container import BitstreamError, peek, peek_hello
from mantis_core.errors import ModelError
from pipelines.serving.answering import Question, Reply, refusal
from pipelines.serving.catalog import Catalog, Entry
from pipelines.serving.photographs import Photograph

HELLO = "Mantis-Hello"
MAX_BODY = 1 << 20
MAX_PHOTOGRAPH = 32 << 20  # bytes of an image file
MAX_HELLO = 64  # of its base64 text
CALLERS = 10_000  # whose rates are remembered
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Answer = Callable[[Entry, Question], Awaitable[Reply]]
"""Asks a model."""
Encode = Callable[[Entry, Photograph], Awaitable[bytes | Reply]]
"""Has the client half of a model code a photograph."""


@dataclass(frozen=True)
class Limits:
    """What a caller may do. `token` "" lets everybody in; `rate` is requests a second, 0 for any.

    `max_body` are bytes.
    """

    token: str = field(default="", repr=False)
    max_body: int = MAX_BODY
    rate: float = 0.0


class Asked(BaseModel):
    """Tasks that cameras shall be asked for; none lets them decide."""

    tasks: list[str]


class Refused(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, reason: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.reply = Reply(status, {"error": message, "reason": reason})
        self.headers = headers


class Desk:
    """What a service knows while it runs: its models, what is asked, and its counters."""

    def __init__(self, catalog: Catalog, limits: Limits, answer: Answer, encode: Encode) -> None:
        self.catalog, self.limits, self.answer, self.encode = catalog, limits, answer, encode
        self.request: tuple[str, ...] | None = None
        self.registry = CollectorRegistry()
        self.replies = Counter(
            "mantis_replies", "Replies by status", ["status"], registry=self.registry
        )
        self.refused = Counter(
            "mantis_refused", "Refused requests by reason", ["reason"], registry=self.registry
        )
        self.bytes = Counter("mantis_wire_bytes", "Bytes of bodies", registry=self.registry)
        self.seconds = Histogram(
            "mantis_seconds", "Time to a reply", buckets=SECONDS, registry=self.registry
        )
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def let_in(self, caller: str, authorization: str, now: float) -> None:
        """Raises Refused for a caller without the token, and for one that asks too often."""
        token, rate = self.limits.token, self.limits.rate
        given = authorization.removeprefix("Bearer ").encode()
        if token and not hmac.compare_digest(given, token.encode()):
            raise Refused(
                401,
                "token",
                "the token is missing or wrong: send `Authorization: Bearer TOKEN`",
                **{"WWW-Authenticate": "Bearer"},
            )
        if not rate:
            return
        most = max(rate, 1.0)  # a bucket holds the requests of a second
        left, at = self._buckets.pop(caller, (most, now))
        left = min(most, left + (now - at) * rate)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        while len(self._buckets) > CALLERS:
            self._buckets.popitem(last=False)
        if left < 1:
            wait = max(1, round((1 - left) / rate))
            raise Refused(
                429,
                "rate",
                f"more than {rate:g} requests a second; wait {wait} s",
                **{"Retry-After": str(wait)},
            )

    def model_of(self, stream_id: str) -> Entry:
        """The model whose streams carry an id; Refused where there is none."""
        found = self.catalog.find(stream_id)
        if found is None:
            known = ", ".join(id for each in self.catalog.entries for id in sorted(each.stream_ids))
            raise Refused(
                404,
                "another_model",
                f"no model here answers streams of {stream_id}; this service has {known}: give it "
                "the version of the model that this client has, by its name or by moving its alias",
            )
        return found

    def now(self) -> list[str] | None:
        """What cameras are asked now, None where they decide."""
        return None if self.request is None else list(self.request)

    def content(self, reply: Reply, headers: dict[str, str] | None = None) -> JSONResponse:
        """A reply as JSON, counted."""
        self.replies.labels(str(reply.status)).inc()
        if "reason" in reply.content:
            self.refused.labels(reply.content["reason"]).inc()
        return JSONResponse(reply.content, reply.status, headers=headers)


def create_app(desk: Desk) -> FastAPI:
    """The application of a desk. Its pages of documentation load from elsewhere, so it has none;
    `/openapi.json` describes it."""
    app = FastAPI(title="MANTiS", docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return desk.content(error.reply, error.headers)

    @app.exception_handler(BitstreamError)
    async def unread(request: Request, error: BitstreamError) -> JSONResponse:
        return desk.content(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return desk.content(Reply(422, {"error": said, "reason": "request"}))

    @app.exception_handler(HTTPException)
    async def no_such_call(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {error.detail}; /openapi.json lists the calls"
        return desk.content(Reply(error.status_code, {"error": said, "reason": "call"}))

    async def asked(
        request: Request, question: Callable[[bytes], tuple[str, Question]]
    ) -> JSONResponse:
        began = time.monotonic()
        enter(desk, request)
        body = await _body(request, desk.limits.max_body)
        desk.bytes.inc(len(body))
        stream_id, asks = question(body)
        entry = desk.model_of(stream_id)
        reply = await _of_model(entry, desk.answer(entry, asks))
        desk.seconds.observe(time.monotonic() - began)
        return desk.content(Reply(reply.status, {**reply.content, "request": desk.now()}))

    @app.post("/v1/answers")
    async def answers(request: Request, masks: bool = False) -> JSONResponse:
        """Answers a stream, the body; with `masks` those of segmentation tasks as PNG."""

        def question(body: bytes) -> tuple[str, Question]:
            return str(peek(body)["stream_id"]), Question(body, masks=masks)

        return await asked(request, question)

    @app.post("/v1/messages")
    async def messages(
        request: Request,
        hello: Annotated[str, Header(alias=HELLO)] = "",
        task: Annotated[list[str] | None, Query()] = None,
        masks: bool = False,
    ) -> JSONResponse:
        """Answers a message of a session, the body; `task` are what was asked for."""

        def question(body: bytes) -> tuple[str, Question]:
            opened = _decoded(hello)
            tasks = tuple(task) if task else None
            return peek_hello(opened), Question(body, opened, tasks, masks)

        return await asked(request, question)

    @app.post("/v1/streams")
    async def streams(
        request: Request,
        model: str,
        task: Annotated[list[str] | None, Query()] = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> Response:
        """Encodes a photograph, the body, by the client of the `model` with that stream id."""
        enter(desk, request)
        entry = desk.model_of(model)
        if not entry.encodes:
            raise Refused(
                404, "no_client", f"{entry.source} is the server half alone: encode with its client"
            )
        body = await _body(request, MAX_PHOTOGRAPH)
        desk.bytes.inc(len(body))
        photograph = Photograph(body, tuple(task) if task else None, level, max_bytes)
        made = await _of_model(entry, desk.encode(entry, photograph))
        if isinstance(made, Reply):
            return desk.content(made)
        desk.replies.labels("200").inc()
        return Response(made, media_type="application/octet-stream")

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        """Which models answer, and what cameras are asked now."""
        enter(desk, request)
        listed = [each.to_json() for each in desk.catalog.entries]
        return desk.content(Reply(200, {"models": listed, "request": desk.now()}))

    @app.put("/v1/request")
    async def set_request(request: Request) -> JSONResponse:
        """Sets what cameras are asked from now on: they hear it with their next answer.

        The body is JSON, `{"tasks": [...]}`; none lets cameras decide.
        """
        enter(desk, request)
        wanted = _asked(await _body(request, desk.limits.max_body))
        entries = desk.catalog.entries
        known = {task for each in entries for task in each.every_task}
        if unknown := sorted(set(wanted.tasks) - known):
            raise Refused(
                422,
                "request",
                f"no model here has {', '.join(unknown)}; tasks are {', '.join(sorted(known))}",
            )
        every = (own for task in wanted.tasks for each in entries for own in each.asks(task))
        asked = tuple(dict.fromkeys(every))
        try:
            for each in entries:
                each.check_asked(asked)
        except ModelError as error:
            raise Refused(422, "request", str(error)) from None
        desk.request = asked or None
        return desk.content(Reply(200, {"request": desk.now()}))

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Whether the service is up, and how many models it has."""
        return {"status": "ok", "models": len(desk.catalog.entries)}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counters in Prometheus' form."""
        enter(desk, request)
        return Response(generate_latest(desk.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _of_model(entry: Entry, told: Awaitable[T]) -> T:
    """What a model says; Refused where no replica is there to say it."""
    try:
        return await told
    except Exception as error:
        logger.exception("no answer of model %s", entry.model_id)
        raise Refused(
            503, "unavailable", "the model does not answer now; try again", **{"Retry-After": "1"}
        ) from error


def enter(desk: Desk, request: Request) -> None:
    """Lets a request in; Refused as `Desk.let_in`."""
    caller = request.client.host if request.client else ""
    desk.let_in(caller, request.headers.get("authorization", ""), time.monotonic())


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than `most` bytes; Refused for a longer one."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise Refused(413, "too_large", f"a body of over {most} bytes; allowed are {most}")
    return bytes(found)


def _asked(body: bytes) -> Asked:
    try:
        return Asked.model_validate_json(body)
    except ValidationError:
        raise Refused(422, "request", 'the body is not {"tasks": ["NAME", ...]}') from None


def _decoded(hello: str) -> bytes:
    try:
        if len(hello) > MAX_HELLO:
            raise ValueError(f"{len(hello)} characters, more than {MAX_HELLO}")
        return base64.b64decode(hello, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            400, "not_a_stream", f"the header {HELLO} is no base64 of a hello: {error}"
        ) from None
