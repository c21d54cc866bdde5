"""Two services to compare with, of one process each and without Ray, run by `benchmarks.serving`.

    python -m benchmarks.serving.plain streams MODEL --port 8001
    python -m benchmarks.serving.plain jpeg MODEL --port 8001 [--teacher NAME]

`streams` decodes each stream by itself with the model's server. `jpeg` decodes a JPEG of the
model's size with Pillow, and answers it by a network of the teacher's architecture.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
from torch import Tensor

from benchmarks.program import one_message, say
from benchmarks.serving.bodies import ANSWERS
from benchmarks.serving.load import HOST
from benchmarks.serving.services import READY
from mantis_core.codec.checkpoint import load_server
from mantis_core.codec.spec import ModelSpec
from mantis_core.networks.preprocessing import normalise
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.teacher import Teacher

Reply = Callable[[bytes], dict[str, Any]]
"""The content of the reply to a body."""


def streams(folder: str) -> Reply:
    """Answers streams, one at a time."""
    codec = load_server(folder)

    def reply(body: bytes) -> dict[str, Any]:
        return {"answers": [each.to_dict() for each in codec.decode([body])]}

    return reply


def random_teacher(spec: ModelSpec, name: str | None = None) -> Teacher:
    """A network of the teacher's architecture, or of another one, with random weights.

    The same at each call: these take the time that trained ones take.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = name not in (None, spec.teacher)
        return Teacher(
            name or spec.teacher,
            split=Backbone(name or spec.teacher).names[-2] if other else spec.split,
            tasks=spec.tasks,
            flat_classes=len(spec.classes) if spec.single_class else 0,
            image_size=spec.image_size,
        ).eval()


def jpeg(spec: ModelSpec, name: str | None = None) -> Reply:
    """Answers JPEGs, one at a time, by a teacher."""
    teacher = random_teacher(spec, name)

    @torch.no_grad()
    def reply(body: bytes) -> dict[str, Any]:
        pixels = np.array(Image.open(io.BytesIO(body), formats=["JPEG"]).convert("RGB"))
        outputs = teacher(normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        return {"answers": [_answer(spec, outputs)]}

    return reply


def create_app(reply: Reply) -> FastAPI:
    """A service that answers each request in its handler. What it cannot read is a 400."""
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.post(ANSWERS)
    async def answers(request: Request) -> Response:
        try:
            content = reply(await request.body())
        except (ValueError, OSError) as error:
            return Response(json.dumps({"error": str(error)}), 400)
        return Response(json.dumps(content), media_type="application/json")

    return app


def _answer(spec: ModelSpec, outputs: dict[str, Tensor]) -> dict[str, Any]:
    labels, shares = {}, {}
    index = int(outputs["logits"].argmax()) if spec.single_class else -1
    for task in spec.tasks:
        own = outputs.get(f"logits/{task.name}")
        if own is None:
            continue
        if task.is_classification:
            labels[task.name] = int(own.argmax())
        else:
            mask = own[0].argmax(dim=0).to(torch.uint8).numpy()
            values, counts = np.unique(mask, return_counts=True)
            shares[task.name] = dict(
                zip(map(str, values), (counts / mask.size).tolist(), strict=True)
            )
    return {
        "model_id": "",
        "tasks": [*labels, *shares],
        "labels": labels,
        "class_index": index,
        "segmentation": shares,
    }


@one_message
def main() -> None:
    """Runs one of the services until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("streams", "jpeg"))
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--teacher", help="a network's name; the model's own teacher")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.kind == "streams":
        reply = streams(arguments.model)
    else:
        reply = jpeg(load_server(arguments.model).spec, arguments.teacher)
    say(f"{READY} http://{HOST}:{arguments.port}{ANSWERS}")
    uvicorn.run(create_app(reply), host=HOST, port=arguments.port, log_level="error", ws="none")


if __name__ == "__main__":
    main()
