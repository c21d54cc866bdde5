"""The service on Ray Serve: one front that lets requests in, and replicas that answer them.

A replica holds a few models at a time and takes the requests of many callers together. A new
catalog reaches the front while it runs: nothing restarts, and no request is lost.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from mantis_core.codec.checkpoint import load_server
from mantis_core.codec.server_codec import ServerCodec
from mantis_core.errors import ModelError
from pipelines.cluster.ray_private import replica_listens_on
from pipelines.serving.answering import Question, Reply, replies
from pipelines.serving.app import Desk, Limits, create_app
from pipelines.serving.catalog import Catalog, Entry, from_config

APP, FRONT, ANSWERING = "mantis", "Front", "Answering"
MODELS_AT_ONCE = 4  # that a replica holds
BATCH, WAIT_S = 32, 0.004
DRAIN_S = 20.0
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # counters tell the rest

_catalog = Catalog()  # of the front's process, and its desk
_desk: Desk | None = None


@serve.deployment(name=ANSWERING, graceful_shutdown_timeout_s=DRAIN_S, logging_config=QUIET)
class Answering:
    """A replica: loads models when they are first asked, and decodes in a thread of its own."""

    def __init__(self, threads: int, host: str | None) -> None:
        """`host` is the one interface that it listens on, None on a cluster."""
        torch.set_num_threads(threads)
        if host is not None:
            replica_listens_on(host)

    @serve.multiplexed(max_num_models_per_replica=MODELS_AT_ONCE)  # type: ignore[untyped-decorator]
    async def load(self, key: str) -> ServerCodec:
        """The server half of a model, by id and folder."""
        model_id, _, folder = key.partition(" ")
        codec = await asyncio.to_thread(load_server, folder)
        if codec.ids.model.hex() != model_id:
            raise ModelError(
                f"{folder} holds model {codec.ids.model.hex()}, not {model_id} any more"
            )
        return codec

    async def answer(self, question: Question) -> Reply:
        """The reply of the model that the request is for."""
        codec = await self.load(serve.get_multiplexed_model_id())
        return await self.together((codec, question))  # type: ignore[no-any-return]

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


def build(limits: Limits) -> FastAPI:
    """The front's application; runs in its process."""
    global _desk
    handle = serve.get_deployment_handle(ANSWERING, app_name=APP)

    async def answer(entry: Entry, question: Question) -> Reply:
        of_model = handle.options(multiplexed_model_id=f"{entry.model_id} {entry.folder}")
        reply: Reply = await of_model.answer.remote(question)
        return reply

    _desk = Desk(_catalog, limits, answer)
    return create_app(_desk)


def take(config: list[dict[str, Any]]) -> None:
    """Takes a catalog in the front's process, before or after its application is built."""
    global _catalog
    _catalog = from_config(config)
    if _desk is not None:
        _desk.catalog = _catalog


def application(
    catalog: Catalog,
    limits: Limits,
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
        return build(limits)

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
