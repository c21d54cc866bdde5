"""Measures what a reply to one request tells of the other tasks: a probe is trained on latents.

    python -m benchmarks.probe MODEL SHARDS [--level N] [--images N]

MODEL is the checkpoint folder of a codec, SHARDS the folder that `mantis prepare` wrote for it. For
each request, one task or all of them, training images are coded for it, and a small network learns
to tell the labels of all tasks from the symbols that a server receives. Its accuracy on validation
images stands beside that of always giving the most frequent label. An accuracy near that means that
the reply tells nothing of the task. The epochs are chosen on images that neither train nor count.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.program import count, one_message, say
from data_prep.config import DataConfig
from data_prep.manifest import Manifest, read_manifest
from data_prep.read.batches import local_batches
from mantis_core.codec.checkpoint import load_model
from mantis_core.codec.mantis import Mantis
from mantis_core.device.requests import Way
from mantis_core.errors import ModelError
from mantis_core.folders import read_meta
from mantis_core.networks.blocks import ResidualBlock, TaskModules, pool
from mantis_core.tasks import TaskSpec

BATCH = 64
EPOCHS = 20
CHOOSING = 0.15
"""The share of the training images that chooses the number of epochs."""
LR = 2e-3


class Coded(NamedTuple):
    """What a server receives of N images, and their labels: int8 (N, C, h, w), int64 (N, K)."""

    maps: Tensor
    labels: Tensor


class Probe(nn.Module):
    """Received symbols (B, C, h, w) to the logits of each task."""

    def __init__(self, channels: int, tasks: Sequence[TaskSpec], *, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ResidualBlock(channels, width), ResidualBlock(width, 2 * width, stride=2)
        )
        self.heads = TaskModules({t.name: nn.Linear(4 * width, t.num_classes) for t in tasks})

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        features = pool(self.body(maps.float()))
        return {name: head(features) for name, head in self.heads.items()}


def coded(
    model: Mantis,
    shards: str,
    manifest: Manifest,
    data: DataConfig,
    split: str,
    ways: Sequence[Way],
    most: int,
) -> list[Coded]:
    """Returns what a server receives of up to `most` images of a split, for each of `ways`."""
    maps: list[list[NDArray[np.int8]]] = [[] for _ in ways]
    labels: list[NDArray[np.int64]] = []
    looker, left = model.client_codec().looker, most
    for arrays in local_batches(
        shards, manifest, data.reading, split=split, global_batch=BATCH, threads=1
    ):
        images = torch.from_numpy(np.array(arrays["image"][:left]))
        for seen in looker.look(images, ways):
            for own, each in zip(maps, seen, strict=True):
                own.append(each.image.map.clip(-127, 127).astype(np.int8))
        labels.append(np.asarray(arrays["labels"][:left], dtype=np.int64))
        left -= len(images)
        if left <= 0:
            break
    truth = torch.from_numpy(np.concatenate(labels))
    return [Coded(torch.from_numpy(np.stack(own)), truth) for own in maps]


def accuracies(probe: Probe, found: Coded, tasks: Sequence[tuple[int, TaskSpec]]) -> list[float]:
    """Returns the probe's accuracy for each task, over the images that have the task."""
    with torch.no_grad():
        outputs: list[Mapping[str, Tensor]] = [probe(part) for part in torch.split(found.maps, 256)]
    values = []
    for k, task in tasks:
        said = torch.cat([output[task.name].argmax(dim=1) for output in outputs])
        has = found.labels[:, k] >= 0
        values.append(float((said == found.labels[:, k])[has].float().mean()))
    return values


def probed(
    train: Coded, val: Coded, tasks: Sequence[tuple[int, TaskSpec]], *, seed: int
) -> list[float]:
    """Trains a probe. Returns its accuracy for each task, at the epoch that is best for that task.

    That epoch is the best on the last images of `train`, which it is not trained on.
    """
    torch.manual_seed(seed)
    probe = Probe(train.maps.shape[1], [task for _, task in tasks])
    trained = round((1 - CHOOSING) * len(train.maps))
    kept = Coded(train.maps[trained:], train.labels[trained:])
    steps = EPOCHS * (trained // BATCH)
    optimiser = torch.optim.AdamW(probe.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=max(2, steps))
    best = [(-1.0, 0.0)] * len(tasks)
    for _ in range(EPOCHS):
        for rows in _batches(trained):
            outputs = probe.train()(train.maps[rows])
            losses = [
                cross_entropy(outputs[task.name], train.labels[rows, k], ignore_index=-1)
                for k, task in tasks
                if (train.labels[rows, k] >= 0).any()
            ]
            optimiser.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        probe.eval()
        pairs = zip(accuracies(probe, kept, tasks), accuracies(probe, val, tasks), strict=True)
        best = [new if new[0] > old[0] else old for old, new in zip(best, pairs, strict=True)]
    return [value for _, value in best]


def _batches(rows: int) -> Iterator[Tensor]:
    order = torch.randperm(rows)
    yield from torch.split(order[: rows - rows % BATCH], BATCH)


def chance(train: Coded, val: Coded, k: int) -> float:
    """Returns the accuracy on `val` of always giving the label that `train` has most often."""
    own, known = train.labels[:, k], val.labels[:, k] >= 0
    most = torch.bincount(own[own >= 0]).argmax()
    return float((val.labels[known, k] == most).float().mean())


def table(
    requests: Sequence[str], tasks: Sequence[TaskSpec], rows: Sequence[Mapping[str, Any]]
) -> Table:
    """Formats the probe's accuracies: a row for each request, a column for each task."""
    shown = Table(title="what a probe tells of each task from the reply to a request (%)")
    shown.add_column("request")
    for task in tasks:
        shown.add_column(task.name, justify="right")
    for name in (*requests, "chance"):
        own = next(row for row in rows if row["request"] == name)
        shown.add_row(name, *(f"{100 * own['accuracy'][task.name]:.1f}" for task in tasks))
    return shown


@one_message
def main() -> int:
    """Trains a probe for each request, and prints a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a codec that can be asked")
    parser.add_argument("shards", help="folder that `mantis prepare` wrote for it")
    parser.add_argument(
        "--level", type=int, metavar="N", help="rate level; default 0, the largest streams"
    )
    parser.add_argument(
        "--images", type=count, metavar="N", default=4000, help="training images (default 4000)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    if model.spec.model.requests == "detect":
        raise ModelError("this codec detects tasks and cannot be asked: nothing to probe")
    data = DataConfig.model_validate(read_meta(arguments.model)["preparation"]["data"])
    manifest = read_manifest(arguments.shards)
    tasks = [(k, task) for k, task in enumerate(model.spec.tasks) if task.is_classification]
    names = model.spec.task_names
    requests: list[tuple[str, Sequence[str]]] = [(name, [name]) for name in names]
    requests += [("all", names)] if len(names) > 1 else []
    ways = [Way(asked, level=arguments.level) for _, asked in requests]
    common = (model, arguments.shards, manifest, data)
    train = coded(*common, "train", ways, arguments.images)
    val = coded(*common, "val", ways, manifest.split("val").rows)
    rows: list[dict[str, Any]] = []
    for number, (request, _) in enumerate(requests):
        found = probed(train[number], val[number], tasks, seed=arguments.seed)
        accuracy = {task.name: round(v, 4) for (_, task), v in zip(tasks, found, strict=True)}
        rows.append({"request": request, "accuracy": accuracy})
        say(f"{request}: {accuracy}")
    often = {task.name: round(chance(train[0], val[0], k), 4) for k, task in tasks}
    rows.append({"request": "chance", "accuracy": often})
    Console(stderr=True).print(table([name for name, _ in requests], [t for _, t in tasks], rows))
    about = {"level": arguments.level or 0, "images": len(train[0].maps), "val": len(val[0].maps)}
    print(json.dumps({**about, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
