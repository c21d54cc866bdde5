"""The services under load, each in processes of its own: started, looked at, ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.program import say
from benchmarks.serving.load import HOST

START_S, END_S = 180.0, 60.0
READY = "answers at"
PARTS = {
    "replica": "ray::ServeReplica:mantis:Answering",
    "front": "ray::ServeReplica:mantis:Front",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
"""What the titles of a service's processes begin with; all others are `rest`."""
MIB = 2**20


class Service:
    """A service that runs: its port, its processes."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def family(self) -> list[psutil.Process]:
        """All its processes that run now."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        return found

    def parts(self) -> list[tuple[str, psutil.Process]]:
        """Its processes, each with the name of its part."""
        found = []
        for each in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((part_of(" ".join(each.cmdline())), each))
        return found

    def pids(self, part: str) -> list[int]:
        """The processes of a part."""
        return [process.pid for name, process in self.parts() if name == part]

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that the processes of each part have used."""
        found: dict[str, float] = {}
        for name, process in self.parts():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[name] = found.get(name, 0.0) + times.user + times.system
        return found

    def cpu_of(self, pid: int) -> float:
        """Seconds of CPU that a process has used; 0 of one that is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def memory(self) -> dict[str, float]:
        """Resident memory of each part in MiB."""
        found: dict[str, float] = {}
        for name, process in self.parts():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[name] = found.get(name, 0.0) + process.memory_info().rss / MIB
        return {name: round(value, 1) for name, value in found.items()}

    def reached(self, part: str, pid: int) -> bool:
        """Whether the one process of a part has a connection to the process `pid`."""
        try:
            ports = {
                each.laddr.port
                for each in psutil.Process(pid).net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            }
            (asking,) = self.pids(part)
            return any(
                each.status == psutil.CONN_ESTABLISHED and each.raddr.port in ports
                for each in psutil.Process(asking).net_connections("tcp")
            )
        except (psutil.NoSuchProcess, ValueError):
            return False

    def wait_for(self, words: str, seconds: float) -> None:
        """Returns when the service has written `words`; RuntimeError if that takes too long."""
        until = time.monotonic() + seconds
        while words not in self.written():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the service did not say {words!r}: {self.written()[-3000:]}")
            time.sleep(0.1)

    def written(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")


def part_of(title: str) -> str:
    """The part of a service that a process with this title belongs to."""
    return next((name for name, start in PARTS.items() if title.startswith(start)), "rest")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(words: Sequence[str], folder: Path) -> Iterator[Service]:
    """A service inside the block: `python -m` with these words and a port; its log in `folder`.

    Says what it had to kill.
    """
    port = free_port()
    log = folder / f"log-{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)],
            stdout=file,
            stderr=file,
            start_new_session=True,  # an interrupt of this program reaches it once
        )
    service = Service(process, port, log)
    try:
        service.wait_for(READY, START_S)
        yield service
    finally:
        _end(service)


def served(
    model: str, replicas: int, *, root: Path | None = None, every: float = 10.0
) -> list[str]:
    """The words for `mantis serve` of a model."""
    words = ["pipelines", "serve", model, "--no-page", "--host", HOST]
    words += ["--replicas", str(replicas), "--every", str(every)]
    return words if root is None else [*words, "--root", str(root)]


def _end(service: Service) -> None:
    processes = service.family()
    if service.process.poll() is None:
        service.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.process.wait(END_S)
    _, left = psutil.wait_procs(processes, timeout=10)
    for each in left:
        say(f"the service left process {each.pid}, which is killed now")
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, timeout=10)
    with contextlib.suppress(subprocess.TimeoutExpired):
        service.process.wait(10)
