"""The service on Ray Serve: one front that lets requests in, and replicas that answer them.

A replica holds a few models at a time and takes the requests of many callers together. A new
catalog reaches the front while it runs: nothing restarts, and no request is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError

from mantis_core.codec.checkpoint import load_client, load_server
from mantis_core.codec.client_codec import ClientCodec
from mantis_core.codec.server_codec import ServerCodec
from mantis_core.errors import ModelError
from pipelines.cluster.ray_private import replica_listens_on
from pipelines.serving.answering import Question, Reply, replies
from pipelines.serving.app import Desk, Limits, create_app
from pipelines.serving.catalog import Catalog, Entry, from_config
from pipelines.serving.pages import Page, add_page
from pipelines.serving.photographs import Photograph, stream_of

APP, FRONT, ANSWERING = "mantis", "Front", "Answering"
MODELS_AT_ONCE = 4  # that a replica holds
BATCH, WAIT_S = 32, 0.004
DRAIN_S = 20.0
TRIES = 3
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # counters tell the rest

T = TypeVar("T")

logger = logging.getLogger(__name__)

_catalog = Catalog()  # of the front's process, and its desk
_desk: Desk | None = None


class Loaded:
    """A model in a replica. Its client is read when it is first needed."""

    def __init__(self, model_id: str, folder: str) -> None:
        self.folder, self.server = folder, load_server(folder)
        if self.server.ids.model.hex() != model_id:
            raise ModelError(
                f"{folder} holds model {self.server.ids.model.hex()}, not {model_id} any more"
            )

    @cached_property
    def client(self) -> ClientCodec:
        """The client half; ModelError where the folder has none."""
        return load_client(self.folder)


@serve.deployment(name=ANSWERING, graceful_shutdown_timeout_s=DRAIN_S, logging_config=QUIET)
class Answering:
    """A replica: loads models when they are first asked, and decodes in a thread of its own."""

    def __init__(self, threads: int, host: str | None) -> None:
        """`host` is the one interface that it listens on, None on a cluster."""
        torch.set_num_threads(threads)
        if host is not None:
            replica_listens_on(host)

    @serve.multiplexed(max_num_models_per_replica=MODELS_AT_ONCE)  # type: ignore[untyped-decorator]
    async def load(self, key: str) -> Loaded:
        """A model, by id and folder."""
        model_id, _, folder = key.partition(" ")
        return await asyncio.to_thread(Loaded, model_id, folder)

    async def answer(self, key: str, question: Question) -> Reply:
        """The reply of the model that `key` names, see `load`."""
        model = await self.load(key)
        return await self.together((model.server, question))  # type: ignore[no-any-return]

    async def encode(self, key: str, photograph: Photograph) -> bytes | Reply:
        """The stream of a photograph, by the client of the model that `key` names."""
        model = await self.load(key)
        return await asyncio.to_thread(lambda: stream_of(model.client, photograph))

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def together(self, asked: list[tuple[ServerCodec, Question]]) -> list[Reply]:
        """Replies to the questions of several callers, those of one model at once."""
        return await asyncio.to_thread(_by_model, asked)


def _by_model(asked: Sequence[tuple[ServerCodec, Question]]) -> list[Reply]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, (codec, _) in enumerate(asked):
        rows[id(codec)].append(row)
    found: dict[int, Reply] = {}
    for own in rows.values():
        codec = asked[own[0]][0]
        found |= zip(own, replies(codec, [asked[row][1] for row in own]), strict=True)
    return [found[row] for row in range(len(asked))]


def key_of(entry: Entry) -> str:
    """What a replica loads a model by."""
    return f"{entry.model_id} {entry.folder}"


def build(limits: Limits, page: Page | None) -> FastAPI:
    """The front's application; runs in its process."""
    global _desk
    handle = serve.get_deployment_handle(ANSWERING, app_name=APP)

    def replicas(key: str) -> Any:
        """Who may be asked. With a model's id, Serve asks those that hold it while one has room,
        and never a new one: it is given only where there are more models than a replica holds.
        """
        crowded = len(_catalog.entries) > MODELS_AT_ONCE
        return handle.options(multiplexed_model_id=key) if crowded else handle

    async def told(ask: Callable[[], Awaitable[T]]) -> T:
        """What a replica says; another one is asked where it dies, since asking changes nothing."""
        for _ in range(TRIES - 1):
            try:
                return await ask()
            except RayActorError:
                logger.warning("a replica has died; its request goes to another")
        return await ask()

    async def answer(entry: Entry, question: Question) -> Reply:
        key = key_of(entry)
        return await told(lambda: replicas(key).answer.remote(key, question))

    async def encode(entry: Entry, photograph: Photograph) -> bytes | Reply:
        key = key_of(entry)
        return await told(lambda: replicas(key).encode.remote(key, photograph))

    _desk = Desk(_catalog, limits, answer, encode)
    app = create_app(_desk)
    if page is not None:
        add_page(app, _desk, page)
    return app


def take(config: list[dict[str, Any]]) -> None:
    """Takes a catalog in the front's process, before or after its application is built."""
    global _catalog
    _catalog = from_config(config)
    if _desk is not None:
        _desk.catalog = _catalog


def application(
    catalog: Catalog,
    limits: Limits,
    page: Page | None,
    *,
    replicas: int,
    threads: int,
    cpus: float,
    host: str | None,
) -> Any:
    """The deployments, bound. `cpus` are what Ray sets aside for each replica.

    Replicas talk to each other on `host` alone; None is every interface, for a cluster.
    """

    def app() -> FastAPI:  # Serve wants a plain function
        if host is not None:
            replica_listens_on(host)
        return build(limits, page)

    @serve.deployment(name=FRONT, graceful_shutdown_timeout_s=DRAIN_S, logging_config=QUIET)
    @serve.ingress(app)
    class Front:
        """Lets requests in. One process, so that what is asked and rates are known in one place."""

        def __init__(self, answering: Any) -> None:
            pass  # the handle makes Serve start the replicas first

        def reconfigure(self, config: list[dict[str, Any]]) -> None:
            """Takes another catalog, while requests are served."""
            take(config)

    answering = Answering.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        max_ongoing_requests=2 * BATCH,
        max_queued_requests=8 * BATCH,
        ray_actor_options={"num_cpus": cpus},
    ).bind(threads, host)
    front = Front.options(  # type: ignore[attr-defined]
        user_config=catalog.to_config(),
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(answering)
