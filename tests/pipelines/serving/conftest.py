"""Small codecs as model folders, and a service without Ray on a port of this machine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn

from mantis_core.codec.checkpoint import load_client, load_model, load_server, save_model
from mantis_core.codec.mantis import Mantis
from pipelines.serving.answering import Question, Reply, replies
from pipelines.serving.app import Desk, Limits, create_app
from pipelines.serving.catalog import Catalog, Entry, entry_of, exports_by_stream, with_exports
from pipelines.serving.pages import Page, add_page
from pipelines.serving.photographs import Photograph, stream_of
from tests.mantis_core.conftest import make_codec, make_config, make_problem


def saved(folder: Path, seed: int) -> Path:
    """A codec of three tasks with random weights, as a model folder that any process loads."""
    codec = make_codec(make_problem(), make_config(), "resnet18")
    with torch.no_grad():
        codec.client.encoder.to_latent.weight.add_(0.1 * seed)
    codec.train()
    codec.finish()
    save_model(folder, codec, {"step": seed})
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two codecs whose streams differ, and the first with another server."""
    top = tmp_path_factory.mktemp("models")
    first = saved(top / "first", 0)
    other: Mantis = load_model(first)
    with torch.no_grad():
        for parameter in other.server.tails.parameters():
            parameter.add_(1.0)
    other.train().eval()  # forgets its id
    save_model(top / "retrained", other, {"step": 2})
    return [first, saved(top / "second", 1), top / "retrained"]


class Local:
    """Answers by models in this process, as a replica does."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, entry: Entry, question: Question) -> Reply:
        self.asked += 1
        codec = load_server(entry.folder)
        (reply,) = await asyncio.to_thread(replies, codec, [question])
        return reply


async def encode(entry: Entry, photograph: Photograph) -> bytes | Reply:
    """Encodes in this process, as a replica does."""
    return await asyncio.to_thread(stream_of, load_client(entry.folder), photograph)


@contextmanager
def served(
    folders: Sequence[Path],
    limits: Limits | None = None,
    desks: list[Desk] | None = None,
    page: Page | None = None,
) -> Iterator[str]:
    """The address of a service of some model folders."""
    named = [entry_of(folder, folder.name) for folder in folders]
    exports = exports_by_stream(page.exports if page else ())
    catalog = Catalog().with_newer(with_exports(named, exports))
    desk = Desk(catalog, limits or Limits(), Local(), encode)
    if desks is not None:
        desks.append(desk)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(desk)
    if page is not None:
        add_page(app, desk, page)
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
