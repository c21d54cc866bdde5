"""Measures how a codec grows as tasks are added to its server, one after the other.

    python -m benchmarks.adding MODEL [--tasks 20] [--labels 10] [--images 64] [--json]

MODEL is the checkpoint folder of a codec. The weights of the added tasks are random: sizes and
times do not depend on them. After each task all streams, and all answers to the tasks before it,
have to be what they were, to the bit; a difference is an error. A time is the median of five runs
over all images, on one thread, streams of all tasks at once. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.coder import seconds_of
from benchmarks.program import count, one_message, say
from mantis_core.codec.adding import check_same_codec, with_tasks
from mantis_core.codec.checkpoint import Half, load_model, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.device.golden import procedural_image
from mantis_core.tasks import TaskSpec

RUNS = 5
COMPARED = 4
SHOWN = (0, 1, 2, 5, 10, 20, 50, 100)


def folder_bytes(codec: Mantis, half: Half) -> int:
    """Returns the size of the folder of one half."""
    with tempfile.TemporaryDirectory() as made:
        whole, own = Path(made, "whole"), Path(made, half)
        save_model(whole, codec, {"step": 0})
        save_half(own, whole, half)
        return sum(file.stat().st_size for file in own.iterdir())


def decode_ms(codec: Mantis, streams: list[bytes]) -> float:
    """Returns the milliseconds that an answer to one stream takes."""
    server = codec.server_codec()
    times = [seconds_of(partial(server.decode, streams)) for _ in range(RUNS)]
    return 1000 * float(np.median(times)) / len(streams)


def grown(codec: Mantis, tasks: int, labels: int, images: int) -> list[dict[str, Any]]:
    """Returns a row for each number of added tasks of SHOWN, up to `tasks`."""
    made = [procedural_image(number, codec.spec.image_size) for number in range(images)]
    pictures = torch.from_numpy(np.stack(made))
    asked = None if codec.spec.model.requests == "detect" else list(codec.spec.task_names)
    streams = codec.encode(pictures, asked)
    rows = []
    for added in range(tasks + 1):
        if added:
            before = codec
            own = AddedTask(task=TaskSpec(f"added{added}", "classification", labels))
            codec = with_tasks(before, [own])
            check_same_codec(before, codec, COMPARED)
        if added in SHOWN or added == tasks:
            rows.append(
                {
                    "added": added,
                    "client_bytes": folder_bytes(codec, "client"),
                    "server_bytes": folder_bytes(codec, "server"),
                    "decode_ms": round(decode_ms(codec, streams), 3),
                }
            )
            say(f"{added} added")
    return rows


@one_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="checkpoint folder of a codec")
    parser.add_argument("--tasks", type=count, default=20, metavar="N")
    parser.add_argument("--labels", type=count, default=10, metavar="N", help="of each task")
    parser.add_argument("--images", type=count, default=64, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = grown(load_model(options.model), options.tasks, options.labels, options.images)
    if not options.json:
        print(f"{'added':>6} {'client bytes':>13} {'server bytes':>13} {'ms an image':>12}")
        for row in rows:
            print(
                f"{row['added']:>6} {row['client_bytes']:>13,} {row['server_bytes']:>13,} "
                f"{row['decode_ms']:>12.3f}"
            )
    print(json.dumps({"labels": options.labels, "rows": rows}))


if __name__ == "__main__":
    main()
