"""The four measurements of a service under load: each starts its own service and ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.program import say
from benchmarks.serving.bodies import Asked, Material
from benchmarks.serving.figures import (
    counts,
    cpu_per_request,
    first_answer_of,
    in_flight,
    of_load,
)
from benchmarks.serving.load import Load, good_plan, hostile_plan
from benchmarks.serving.material import another_server, jpegs_of, right_answers
from benchmarks.serving.plain import jpeg
from benchmarks.serving.services import Service, served, started
from mantis_core.codec.checkpoint import load_server
from mantis_core.codec.spec import ModelSpec
from pipelines.serving.catalog import entry_of
from pipelines.tracking.registry import promote
from pipelines.tracking.runs import Tracker, locate_tracking

IDLE_S = 3.0
HOSTILE_CONNECTIONS, HOSTILE_S = 4, 300.0
LONGEST_S = 600.0  # of a good load that is ended before
KILL_AFTER_S, BACK_S, AFTER_S = 3.0, 60.0, 3.0
WINDOW_S, WINDOWS, PART = 1.0, 3, 0.25  # how long, and how much of the other's CPU, is work
MOVED_S, BETWEEN_S, EVERY_S = 60.0, 2.0, 0.5
DIED = "a replica has died"  # what the front writes when it asks another one
NAME = "mantis"  # of the registered model


@dataclass(frozen=True)
class Settings:
    """What is served and how it is asked. `scratch` takes logs and models; `model` is a folder."""

    model: Path
    spec: ModelSpec
    images: Tensor
    asked: tuple[Asked, ...]
    material: Material
    scratch: Path
    seconds: float
    connections: int
    replicas: int
    hostile: int
    quality: int
    teacher: str | None


def throughput(own: Settings) -> dict[str, Any]:
    """Good requests for some seconds to `mantis serve` and to two plain services, one by one."""
    plain, model = "benchmarks.serving.plain", str(own.model)
    of_teacher = [] if own.teacher is None else ["--teacher", own.teacher]
    jpegs = jpegs_of(own.images, own.quality, jpeg(own.spec, own.teacher))
    services: dict[str, tuple[list[str], Sequence[Asked], dict[str, Any]]] = {
        "mantis_serve": (served(model, own.replicas), own.asked, {"replicas": own.replicas}),
        "fastapi": ([plain, "streams", model], own.asked, {}),
        "jpeg": (
            [plain, "jpeg", model, *of_teacher],
            jpegs,
            {
                "teacher": own.teacher or own.spec.teacher,
                "random_weights": True,
                "quality": own.quality,
            },
        ),
    }
    found = {}
    for name, (words, asked, about) in services.items():
        say(f"throughput: {name}")
        with started(words, own.scratch) as service:
            plan = good_plan(service.port, asked, own.connections, own.seconds)
            with Load(plan) as load:
                load.wait_begun()
                before = service.cpu_s()
                loaded = load.finish(now=False)
                after = service.cpu_s()
            idle = _idle_cpu(service)
        found[name] = {
            **of_load(loaded),
            "bytes": round(sum(len(each.body) for each in asked) / len(asked), 1),
            "cpu_ms": cpu_per_request(before, after, len(loaded.sent)),
            "idle_cpu": idle,
            **about,
        }
    return found


def hostile(own: Settings) -> dict[str, Any]:
    """Hostile requests beside good ones: what becomes of the good ones, and of the memory."""
    with started(served(str(own.model), own.replicas), own.scratch) as service:
        say("hostile: good requests alone")
        with Load(good_plan(service.port, own.asked, own.connections, own.seconds)) as load:
            load.wait_begun()
            alone = load.finish(now=False)
        before = service.memory()
        say(f"hostile: with {own.hostile} hostile requests")
        with Load(good_plan(service.port, own.asked, own.connections, LONGEST_S)) as load:
            load.wait_begun()
            plan = hostile_plan(
                service.port, own.material, own.hostile, HOSTILE_CONNECTIONS, HOSTILE_S
            )
            with Load(plan) as attack:
                attack.wait_begun()
                attacked = attack.finish(now=False)
            beside = load.finish(now=True)
        after = service.memory()
    kinds = attacked.kinds or {}
    return {
        "without": of_load(alone),
        "with": of_load(beside),
        "asked_for": own.hostile,
        "sent": sum(sum(each.values()) for each in kinds.values()),
        "seconds": round(attacked.seconds, 2),
        "attack_cpu": round(attacked.cpu_s / attacked.seconds, 3),
        "kinds": kinds,
        "server_errors": sum(
            count
            for found in kinds.values()
            for status, count in found.items()
            if status.startswith("5")
        ),
        "memory_before": before,
        "memory_after": after,
    }


def kill(own: Settings) -> dict[str, Any]:
    """One of two replicas killed while good requests are sent.

    The times are those until the front has a connection to a new one, and until that one takes
    its part of the work; None after BACK_S.
    """
    with (
        started(served(str(own.model), 2), own.scratch) as service,
        Load(good_plan(service.port, own.asked, own.connections, LONGEST_S)) as load,
    ):
        load.wait_begun()
        time.sleep(KILL_AFTER_S)
        replicas = service.pids("replica")
        if len(replicas) != 2:
            raise RuntimeError(f"there are {len(replicas)} replicas, and not 2")
        say(f"kill: process {replicas[0]} of 2 replicas")
        killed = time.monotonic()
        os.kill(replicas[0], signal.SIGKILL)
        connected, working = _replaced(service, replicas[1], killed, load)
        time.sleep(AFTER_S)
        loaded = load.finish(now=True)
        asked_again = service.written().count(DIED)
    return {
        **of_load(loaded),
        "in_flight": in_flight(loaded.sent, killed),
        "asked_again": asked_again,
        "lost_after_s": [round(each.ended - killed, 3) for each in loaded.sent if each.lost],
        "connected_s": connected,
        "both_again_s": working,
        "waited_s": BACK_S,
    }


def promotion(own: Settings) -> dict[str, Any]:
    """The alias of a registered model moved twice while good requests are sent."""
    root = own.scratch / "root"
    folders = [root / "files" / str(number) for number in (1, 2, 3)]
    checkpoints = [folder / "artifacts" / "checkpoint" for folder in folders]
    checkpoints[0].parent.mkdir(parents=True)
    checkpoints[0].symlink_to(own.model.resolve(), target_is_directory=True)
    for seed, folder in enumerate(checkpoints[1:], start=1):
        folder.parent.mkdir(parents=True)
        another_server(folder, own.model, seed)
    tracker = Tracker(locate_tracking(None, str(root)), NAME)
    client = tracker.client
    client.create_registered_model(NAME)
    for folder in folders:
        client.create_model_version(NAME, str(folder))
    promote(tracker, f"models:/{NAME}/1")
    streams = [each.body for each in own.asked]
    asked = right_answers(streams, [load_server(folder) for folder in checkpoints])
    moved: list[float] = []
    words = served(f"models:/{NAME}@champion", own.replicas, root=root, every=EVERY_S)
    with (
        started(words, own.scratch) as service,
        Load(good_plan(service.port, asked, own.connections, LONGEST_S)) as load,
    ):
        load.wait_begun()
        for number in (2, 3):
            time.sleep(BETWEEN_S)
            say(f"promotion: to version {number}")
            moved.append(time.monotonic())
            promote(tracker, f"models:/{NAME}/{number}")
            model_id = entry_of(checkpoints[number - 1], "").model_id
            service.wait_for(f"is now model {model_id}", MOVED_S)
        time.sleep(BETWEEN_S)
        loaded = load.finish(now=True)
    after = [first_answer_of(loaded.sent, place + 1, since) for place, since in enumerate(moved)]
    return {
        **of_load(loaded),
        "answers_after_s": [None if each is None else round(each, 2) for each in after],
        "answers_of": counts(str(each.answer + 1) for each in loaded.sent if not each.lost),
    }


def _idle_cpu(service: Service) -> float:
    """The CPUs that a service uses while nobody asks."""
    time.sleep(1.0)  # what is left of the load
    before, began = service.cpu_s(), time.monotonic()
    time.sleep(IDLE_S)
    spent = sum(service.cpu_s().values()) - sum(before.values())
    return round(spent / (time.monotonic() - began), 3)


def _replaced(
    service: Service, kept: int, since: float, load: Load
) -> tuple[float | None, float | None]:
    """Seconds until the front reaches a replica beside `kept`, and until that one works.

    It works if it uses PART of the other's CPU or more for WINDOWS in a row, and did from the first
    of them on.
    """
    connected: float | None = None
    began: list[float] = []
    while time.monotonic() - since < BACK_S and load.running():
        others = [pid for pid in service.pids("replica") if pid != kept]
        if connected is None:
            time.sleep(WINDOW_S / 4)
            if any(service.reached("front", pid) for pid in others):
                connected = round(time.monotonic() - since, 2)
            continue
        start = time.monotonic() - since
        before = [service.cpu_of(kept), sum(map(service.cpu_of, others))]
        time.sleep(WINDOW_S)
        own, other = service.cpu_of(kept) - before[0], sum(map(service.cpu_of, others)) - before[1]
        began = [*began, start] if other >= PART * own > 0 else []
        if len(began) == WINDOWS:
            return connected, round(began[0], 2)
    return connected, None


PARTS = {"throughput": throughput, "hostile": hostile, "kill": kill, "promotion": promotion}
"""What `--only` names."""
