"""Measures `mantis serve` under load: its speed, and what it loses when things go wrong.

    python -m benchmarks.serving MODEL [IMAGE ...] [--seconds 20] [--connections 8] [--replicas 1]
    python -m benchmarks.serving MODEL --only hostile,kill --hostile 10000 --json

MODEL is the folder of a whole codec. Without images, drawn ones are sent. All runs on 127.0.0.1:

throughput   requests/s and latency of good streams on keep-alive connections, to `mantis serve`, to
             a FastAPI service that decodes a stream at a time, and of JPEGs to one that runs the
             teacher's architecture with random weights. `cpu_ms` are milliseconds of CPU a request
             by part of the service, `idle_cpu` the CPUs it uses without requests, `load_cpu` those
             of the process that sends.
hostile      hostile requests on connections of their own, for 300 s at most: their statuses, what
             becomes of the good ones, and the service's memory.
kill         one of two replicas killed: good requests that are lost or, taken by a replica, asked
             again by the front; seconds until the front reaches a new replica, and until that one
             takes its part of the work.
promotion    the alias of a registered model moved twice: good requests that are lost.

A good request is lost if its reply is not 200 with the right model, tasks, labels and class. The
exit code is 1 if one is lost, or if a hostile one gets a status of 500 or more. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.program import count, one_message, say

MOST_SECONDS, MOST_CONNECTIONS, MOST_HOSTILE = 60, 64, 100_000
PARTS = ("throughput", "hostile", "kill", "promotion")
WIDTH = 200  # characters of a table that goes to a file


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ends the program where they ask for more than a load may take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a whole codec")
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files to send")
    parser.add_argument("--seconds", type=count, default=20, help="of each load; 60 at most")
    parser.add_argument("--connections", type=count, default=8, help="of good requests")
    parser.add_argument("--replicas", type=count, default=1, help="of `mantis serve`; kill has 2")
    parser.add_argument("--hostile", type=count, default=10_000, help="number of hostile requests")
    parser.add_argument("--quality", type=count, default=75, help="of JPEGs, 1 to 95")
    parser.add_argument("--teacher", help="the network that JPEGs go to; the model's own teacher")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    found = parser.parse_intermixed_args(argv)
    for name, most in (
        ("seconds", MOST_SECONDS),
        ("connections", MOST_CONNECTIONS),
        ("hostile", MOST_HOSTILE),
        ("quality", 95),
    ):
        if getattr(found, name) > most:
            parser.error(f"--{name} is {getattr(found, name)}: give {most} or less")
    found.only = found.only.split(",")
    if unknown := [name for name in found.only if name not in PARTS]:
        parser.error(f"--only {unknown[0]!r}: the parts are {', '.join(PARTS)}")
    return found


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The figures of all parts that are asked for."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch-geometric warns at import
    from benchmarks.serving import material, measurements
    from mantis_core.codec.checkpoint import load_client, load_server
    from pipelines.cluster.machine import usable_cpus

    folder = Path(arguments.model)
    client = load_client(folder)
    images = material.images_of(client, arguments.images)
    streams = material.streams_of(client, images)
    own = measurements.Settings(
        folder,
        client.spec,
        images,
        tuple(material.right_answers(streams, [load_server(folder)])),
        material.material_of(client, images, streams),
        scratch,
        arguments.seconds,
        arguments.connections,
        arguments.replicas,
        arguments.hostile,
        arguments.quality,
        arguments.teacher,
    )
    found: dict[str, Any] = {
        "cpus": usable_cpus(),
        "image_size": list(client.spec.image_size),
        "images": len(images),
        "connections": arguments.connections,
    }
    for name in PARTS:
        if name in arguments.only:
            found[name] = measurements.PARTS[name](own)
    return found


@one_message
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, then prints tables and one JSON object."""
    arguments = arguments_of(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its services end with it
    with tempfile.TemporaryDirectory(prefix="mantis-serving-") as scratch:
        result = measure(arguments, Path(scratch))
    from benchmarks.serving.figures import lost_anywhere, tables

    lost = lost_anywhere(result)
    result["ok"] = not lost
    if not arguments.json:
        console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
        for table in tables(result):
            console.print(table)
        if lost:
            say(f"{lost} good requests were lost, or hostile ones answered with a server's error")
    print(json.dumps(result, allow_nan=False))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
