"""The load generator: a process of its own that keeps connections busy and records every reply.

It reads a plan as one line of JSON, says `begun` after its warm-up, and prints one JSON object when
its time or count is over, or when its standard input is closed. `Load` is its other end.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from benchmarks.serving.bodies import (
    Asked,
    Material,
    asked_from,
    hostile,
    material_from,
    which_right,
)

HOST = "127.0.0.1"
TIMEOUT_S = 30.0  # of one reply
MOST = 200_000  # requests of a connection
WARM = 5  # requests of a connection before anything is recorded
PAUSE_S = 0.02  # after a connection broke
BEGUN = "begun"


class Sent(NamedTuple):
    """A good request: when it was sent and answered, on the clock that processes share.

    `status` is 0 where no reply came. `answer` is the place of the right answer, -1 for a wrong
    one.
    """

    began: float
    ended: float
    status: int
    answer: int

    @property
    def lost(self) -> bool:
        """Whether it was not answered, or not rightly."""
        return self.status != 200 or self.answer < 0


@dataclass(frozen=True)
class Loaded:
    """What a load has found. `kinds` are statuses of hostile requests, by kind."""

    seconds: float
    cpu_s: float
    sent: tuple[Sent, ...] = ()
    kinds: dict[str, dict[str, int]] | None = None


class Load:
    """A load in a process of its own; a context that ends it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """Starts it. `plan` is from `good_plan` or `hostile_plan`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes its pipes and waits
            self._process.kill()

    def wait_begun(self) -> None:
        """Returns when the warm-up is over. RuntimeError if the service does not answer it."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != BEGUN:
            raise RuntimeError(f"the load did not begin: {self._told()}")

    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def finish(self, *, now: bool) -> Loaded:
        """What it has found, at its end or `now`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if now:
            self._process.stdin.close()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load broke off: {self._told()}")
        found = json.loads(line)
        sent = tuple(Sent(*each) for each in found.pop("sent"))
        return Loaded(**found, sent=sent)

    def _told(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        return self._process.stderr.read()[-2000:]


def good_plan(
    port: int, asked: Sequence[Asked], connections: int, seconds: float, *, warm: int = WARM
) -> dict[str, Any]:
    """A load of good requests, in turn on each connection."""
    return {
        "port": port,
        "asked": [each.to_json() for each in asked],
        "connections": connections,
        "seconds": seconds,
        "warm": warm,
    }


def hostile_plan(
    port: int, material: Material, count: int, connections: int, seconds: float
) -> dict[str, Any]:
    """A load of `count` hostile requests, or as many as `seconds` allow."""
    return {
        "port": port,
        "material": material.to_json(),
        "count": count,
        "connections": connections,
        "seconds": seconds,
    }


def reply_to(connection: http.client.HTTPConnection, asked: Asked) -> tuple[int, bytes]:
    """Status and content of a reply; 0 where there is none. A broken connection opens anew."""
    try:
        connection.request("POST", asked.path, asked.body, asked.headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, b""


class _Run:
    """What the connections of a load share."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.port, self.connections = int(plan["port"]), int(plan["connections"])
        self.seconds = float(plan["seconds"])
        self.over, self.until = threading.Event(), float("inf")
        self.ready = threading.Barrier(self.connections + 1)
        self.failures: list[str] = []

    def connection(self) -> http.client.HTTPConnection:
        """A connection that stays open between requests."""
        return http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)

    def numbers(self, most: int) -> Iterator[int]:
        """Counts while there is time."""
        for number in range(most):
            if self.over.is_set() or time.monotonic() >= self.until:
                return
            yield number

    def go(self, work: Callable[[int], None]) -> tuple[float, float]:
        """Works on all connections; returns seconds of the clock and of this process's CPU."""

        def own(place: int) -> None:
            try:
                work(place)
            except threading.BrokenBarrierError:
                pass
            except Exception as error:
                self.failures.append(repr(error))
                self.ready.abort()
                self.over.set()

        threads = [threading.Thread(target=own, args=(i,)) for i in range(self.connections)]
        threading.Thread(target=self._watch_input, daemon=True).start()
        for thread in threads:
            thread.start()
        try:
            self.ready.wait()
        except threading.BrokenBarrierError:
            sys.exit("; ".join(self.failures))
        began, cpu = time.monotonic(), time.process_time()
        print(BEGUN, flush=True)
        for thread in threads:
            thread.join()
        if self.failures:
            sys.exit("; ".join(self.failures))
        return time.monotonic() - began, time.process_time() - cpu

    def begin(self) -> None:
        """Waits for the other connections, then lets the time run."""
        self.ready.wait()
        self.until = time.monotonic() + self.seconds

    def _watch_input(self) -> None:
        while os.read(0, 1024):  # sys.stdin would stay locked at the end of the process
            pass
        self.over.set()


def _send_good(
    run: _Run, asked: Sequence[Asked], warm: int
) -> tuple[tuple[float, float], list[Sent]]:
    found: list[list[Sent]] = [[] for _ in range(run.connections)]

    def work(place: int) -> None:
        connection = run.connection()
        for number in range(warm):
            each = asked[(place + number) % len(asked)]
            status, content = reply_to(connection, each)
            if status != 200 or which_right(each, content) < 0:
                raise RuntimeError(f"a warm-up request was replied {status}: {content[:300]!r}")
        run.begin()
        for number in run.numbers(MOST):
            each = asked[(place + number) % len(asked)]
            began = time.monotonic()
            status, content = reply_to(connection, each)
            ended = time.monotonic()
            answer = which_right(each, content) if status == 200 else -1
            found[place].append(Sent(began, ended, status, answer))
            if not status:
                time.sleep(PAUSE_S)
        connection.close()

    took = run.go(work)
    return took, sorted(itertools.chain(*found))


def _send_hostile(
    run: _Run, material: Material, count: int
) -> tuple[tuple[float, float], dict[str, Counter[str]]]:
    kinds: dict[str, Counter[str]] = {}
    lock = threading.Lock()

    def work(place: int) -> None:
        connection = run.connection()
        run.begin()
        for number in run.numbers(len(range(place, count, run.connections))):
            kind, each = hostile(place + number * run.connections, material)
            status, _ = reply_to(connection, each)
            with lock:
                kinds.setdefault(kind, Counter())[str(status)] += 1
        connection.close()

    return run.go(work), kinds


def main() -> None:
    """Runs the plan on standard input."""
    plan = json.loads(sys.stdin.readline())
    run = _Run(plan)
    sent: list[Sent] = []
    kinds: dict[str, Counter[str]] | None = None
    if "material" in plan:
        took, kinds = _send_hostile(run, material_from(plan["material"]), int(plan["count"]))
    else:
        took, sent = _send_good(run, [asked_from(each) for each in plan["asked"]], plan["warm"])
    print(json.dumps({"seconds": took[0], "cpu_s": took[1], "sent": sent, "kinds": kinds}))


if __name__ == "__main__":
    main()
