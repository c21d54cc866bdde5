"""The service over HTTP: what is let in, and who answers. Knows no Ray.

    POST /v1/answers             a stream, as `mantis encode` writes it
    POST /v1/messages?task=NAME  a message of a session; its hello in the header Mantis-Hello
    GET  /v1/models              the models that answer, and what is asked now
    PUT  /v1/request             what cameras shall be asked from now on
    GET  /healthz, /metrics      for whoever watches the service

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
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError

from mantis_core.bitstream.container import BitstreamError, peek, peek_hello
from pipelines.serving.answering import Question, Reply, refusal
from pipelines.serving.catalog import Catalog, Entry

HELLO = "Mantis-Hello"
MAX_BODY = 1 << 20
MAX_HELLO = 64  # of its base64 text
CALLERS = 10_000  # whose rates are remembered
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

logger = logging.getLogger(__name__)

Answer = Callable[[Entry, Question], Awaitable[Reply]]
"""Asks a model."""


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

    def __init__(self, catalog: Catalog, limits: Limits, answer: Answer) -> None:
        self.catalog, self.limits, self.answer = catalog, limits, answer
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
            known = ", ".join(each.stream_id for each in self.catalog.entries)
            raise Refused(
                404,
                "another_model",
                f"no model here answers streams of {stream_id}; this service has {known}",
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

    async def asked(
        request: Request, question: Callable[[bytes], tuple[str, Question]]
    ) -> JSONResponse:
        began = time.monotonic()
        _enter(desk, request)
        body = await _body(request, desk.limits.max_body)
        desk.bytes.inc(len(body))
        stream_id, asks = question(body)
        entry = desk.model_of(stream_id)
        try:
            reply = await desk.answer(entry, asks)
        except Exception as error:
            logger.exception("no answer of model %s", entry.model_id)
            raise Refused(
                503,
                "unavailable",
                "the model does not answer now; try again",
                **{"Retry-After": "1"},
            ) from error
        desk.seconds.observe(time.monotonic() - began)
        return desk.content(Reply(reply.status, {**reply.content, "request": desk.now()}))

    @app.post("/v1/answers")
    async def answers(request: Request) -> JSONResponse:
        """Answers a stream, the body."""

        def question(body: bytes) -> tuple[str, Question]:
            return str(peek(body)["stream_id"]), Question(body)

        return await asked(request, question)

    @app.post("/v1/messages")
    async def messages(
        request: Request,
        hello: Annotated[str, Header(alias=HELLO)] = "",
        task: Annotated[list[str] | None, Query()] = None,
    ) -> JSONResponse:
        """Answers a message of a session, the body; `task` are what was asked for."""

        def question(body: bytes) -> tuple[str, Question]:
            opened = _decoded(hello)
            return peek_hello(opened), Question(body, opened, tuple(task) if task else None)

        return await asked(request, question)

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        """Which models answer, and what cameras are asked now."""
        _enter(desk, request)
        listed = [each.to_json() for each in desk.catalog.entries]
        return desk.content(Reply(200, {"models": listed, "request": desk.now()}))

    @app.put("/v1/request")
    async def set_request(request: Request) -> JSONResponse:
        """Sets what cameras are asked from now on: they hear it with their next answer.

        The body is JSON, `{"tasks": [...]}`; none lets cameras decide.
        """
        _enter(desk, request)
        wanted = _asked(await _body(request, desk.limits.max_body))
        known = {task for each in desk.catalog.entries for task in each.tasks}
        if unknown := sorted(set(wanted.tasks) - known):
            raise Refused(
                422,
                "request",
                f"no model here has {', '.join(unknown)}; tasks are {', '.join(sorted(known))}",
            )
        desk.request = tuple(wanted.tasks) or None
        return desk.content(Reply(200, {"request": desk.now()}))

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Whether the service is up, and how many models it has."""
        return {"status": "ok", "models": len(desk.catalog.entries)}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counters in Prometheus' form."""
        _enter(desk, request)
        return Response(generate_latest(desk.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _enter(desk: Desk, request: Request) -> None:
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
