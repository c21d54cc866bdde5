"""`mantis serve` as a user runs it: on loopback, taking new versions while it answers; its end."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mantis_core.codec.checkpoint import load_client, load_server
from pipelines.serving.camera import Link
from tests.pipelines.processes import alive, family, listening, runs
from tests.root import ROOT

START_S = 150


class Served:
    """The process, its address, and the link that its models are reached by."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.current, self.log = folder / "current", folder / "log"
        self.point_to(model)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "pipelines", "serve", str(self.current), "--every", "0.5"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], cwd=ROOT, stderr=log, stdout=log
            )
        self.wait_for("answers at")

    def point_to(self, model: Path) -> None:
        """Makes the name of the model mean another folder, as an alias that moves."""
        fresh = self.current.with_name("fresh")
        fresh.symlink_to(model)
        os.replace(fresh, self.current)

    def wait_for(self, words: str, seconds: float = START_S) -> None:
        until = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.2)


def replicas_of(served: Served) -> set[int]:
    """The processes of front and replicas."""
    processes = family([psutil.Process(served.process.pid)])
    return {each.pid for each in processes if runs(each, "ray::ServeReplica")}


@pytest.fixture
def served(models: list[Path], tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, models[0])
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()


def test_it_listens_on_loopback_takes_new_versions_and_ends(
    served: Served, models: list[Path]
) -> None:
    processes = family([psutil.Process(served.process.pid)])
    assert listening(processes) <= {"127.0.0.1", "::1"}
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    streams = [load_client(folder).encode(images)[0] for folder in models]
    ids = [load_server(folder).ids.model.hex() for folder in models]
    assert streams[0] == streams[2] != streams[1]
    with Link(served.url) as link:
        assert link.ask("PUT", "/v1/request", b'{"tasks": ["tools"]}')[0] == 200
    replicas = replicas_of(served)
    assert len(replicas) == 2
    replies: list[tuple[int, str]] = []
    over = threading.Event()

    def ask() -> None:
        with Link(served.url) as link:
            while not over.is_set():
                status, content = link.ask("POST", "/v1/answers", streams[0])
                answers = content.get("answers") or [{}]
                replies.append((status, answers[0].get("model_id", str(content))))

    caller = threading.Thread(target=ask)
    caller.start()

    def answered_by(model: str) -> None:  # a replica loads a model with its first request
        until = time.monotonic() + START_S
        while not replies or replies[-1][1] != model:
            assert time.monotonic() < until, replies[-3:]
            time.sleep(0.1)

    try:
        answered_by(ids[0])
        served.point_to(models[2])  # the same client's streams, another server
        served.wait_for(f"is now model {ids[2]}")
        served.point_to(models[1])
        served.wait_for(f"is now model {ids[1]}")
        answered_by(ids[2])
    finally:
        over.set()
        caller.join()
    assert [reply for reply in replies if reply[0] != 200] == []
    assert [model for model, _ in itertools.groupby(model for _, model in replies)] == [
        ids[0],
        ids[2],
    ]
    with Link(served.url) as link:
        for stream, model in zip(streams, (ids[2], ids[1], ids[2]), strict=True):
            status, content = link.ask("POST", "/v1/answers", stream)
            assert (status, content["answers"][0]["model_id"]) == (200, model)
        assert link.ask("POST", "/v1/answers", streams[0][:-2])[0] == 400
        told = link.ask("GET", "/v1/models")[1]
    assert told["request"] == ["tools"]
    assert replicas_of(served) == replicas  # no process was started anew
    listed = told["models"]
    assert [each["model_id"] for each in listed] == [ids[1], ids[2]]
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 130
    until = time.monotonic() + 20
    while alive(processes) and time.monotonic() < until:
        time.sleep(0.2)
    assert alive(processes) == []
    shown = served.log.read_text()
    assert re.search(r"^interrupted$", shown, re.MULTILINE)
    assert "Traceback" not in shown
