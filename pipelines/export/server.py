"""The server's networks as one ONNX graph: symbols and rate level to the output of every task."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mantis_core.codec.server_codec import ServerCodec
from mantis_core.networks.conditioning import shares_of
from mantis_lite.client import LEVEL
from pipelines.export.folders import whole
from pipelines.export.graphs import write_graph

GRAPH, ABOUT, SYMBOLS = "server.onnx", "server.json", "symbols"


class Answers(nn.Module):
    """Symbols (1, C, h, w) and level (1,) to one output for each task, in the order of tasks.

    A classification gives log P (1, n + 1), the last for "not mine"; a segmentation logits
    (1, n, H, W).
    """

    def __init__(self, codec: ServerCodec) -> None:
        super().__init__()
        self.server, self.spec = codec.server, codec.spec
        self.inputs = [SYMBOLS, *[LEVEL] * (codec.spec.num_rates > 1)]
        self.outputs = [f"task {task.name}" for task in codec.spec.answered]

    def forward(self, symbols: Tensor, level: Tensor | None = None) -> tuple[Tensor, ...]:
        """What `inputs` names to what `outputs` names."""
        shares = None if level is None else shares_of(level, self.spec.num_rates)
        split, last = self.server.features(symbols, shares)
        size = self.spec.image_size
        return tuple(self.server.answer(task, split, last, size) for task in self.spec.answered)


def export_server(codec: ServerCodec, folder: Path) -> dict[str, int]:
    """Writes `server.onnx` and `server.json` to `folder`; returns the size of each file.

    The folder appears whole or not at all. The joint decision over tasks and the client's own
    answer are not part of the graph.
    """
    answers = Answers(codec).eval()
    _, height, width = codec.stream_spec.latent_shape(codec.spec.image_size)
    symbols = torch.zeros(1, codec.stream_spec.latent_channels, height, width)
    level = torch.zeros(1, dtype=torch.int64)
    given = (symbols, *[level] * (len(answers.inputs) - 1))
    tasks = [
        {
            "name": task.name,
            "kind": task.kind,
            "labels": list(task.labels),
            "output": output,
        }
        for task, output in zip(codec.spec.answered, answers.outputs, strict=True)
    ]
    about = {
        "stream_id": codec.ids.stream.hex(),
        "model_id": codec.ids.model.hex(),
        "inputs": answers.inputs,
        "symbols": list(symbols.shape),
        "rate_levels": codec.spec.rate_levels,
        "image_size": list(codec.spec.image_size),
        "tasks": tasks,
    }
    with whole(folder, (GRAPH, ABOUT)) as partial:
        write_graph(answers, given, answers.inputs, answers.outputs, partial / GRAPH)
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return {name: (folder / name).stat().st_size for name in (GRAPH, ABOUT)}
