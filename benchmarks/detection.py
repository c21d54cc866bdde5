"""Measures top1 and coverage of a trained codec for different limits on the active tasks.

    python -m benchmarks.detection MODEL SHARDS

MODEL is a checkpoint folder, SHARDS the folder that `mantis prepare` wrote for it. Each row
calibrates the task mask on the holdout rows, as training does, for one limit on active tasks and
one wanted coverage. It then scores the validation split with the probabilities as a stream stores
them. Symbols are rounded but not coded, because coding is lossless. The last line is one JSON
object. Its first row decodes every task.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.program import one_message
from data_prep.config import DataConfig
from data_prep.manifest import read_manifest
from data_prep.read.batches import local_batches
from mantis_core.bitstream.task_field import dequantise_level, quantise_log2
from mantis_core.codec.checkpoint import load_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.masks import coverage_threshold, select_mask
from mantis_core.folders import read_meta
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.server import decided

COVERAGES = (0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Seen:
    """The client's view of a split of N images and K tasks.

    Task probabilities `p` (N, K), true tasks (N, K), classes (N,) and rounded latents (N, C, h, w).
    """

    p: Tensor
    truth: Tensor
    classes: Tensor
    latent: Tensor


@torch.no_grad()
def look(model: Mantis, shards: str, data: DataConfig, split: str) -> Seen:
    """Runs the client on every image of a split."""
    parts: list[tuple[Tensor, ...]] = []
    own = (shards, read_manifest(shards), data.reading)
    for batch in local_batches(*own, split=split, global_batch=128, threads=1):
        images = normalise(torch.from_numpy(batch["image"]))
        view = model.client(images)
        p = torch.sigmoid(view.logits.float())
        latent = model.client.encode(view, p, shares_of(torch.zeros(len(p)), model.spec.num_rates))
        truth, classes = (
            torch.from_numpy(batch["task_mask"]),
            torch.from_numpy(batch["class_label"]),
        )
        parts.append((p, truth, classes, latent.round()))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def as_sent(p: Tensor, mask: Tensor, *, levels: bool) -> Tensor:
    """Returns the task probabilities (N, K) that the server reads from a stream.

    They are quantised in half-bit steps, and 0 outside `mask`. Without `levels`, which a stream may
    leave out, they are 1 inside `mask`.
    """
    if not levels:
        return mask.float()
    return p.clone().apply_(lambda value: dequantise_level(quantise_log2(value))) * mask


@torch.no_grad()
def score(model: Mantis, seen: Seen, mask: Tensor) -> dict[str, float]:
    """Returns top1 of the joint decision over the tasks in `mask` (N, K).

    Also returns the mean number of active tasks and the share of true tasks in `mask`.
    """
    assert model.joint is not None
    levels = model.spec.model.send_probabilities
    size, hits = model.spec.image_size, 0
    for rows in torch.split(torch.arange(len(mask)), 128):
        sent = as_sent(seen.p[rows], mask[rows], levels=levels)
        shares = shares_of(torch.zeros(len(rows)), model.spec.num_rates)
        scores = model.joint(model.server(seen.latent[rows], size, shares), sent.log())
        hits += int((decided(scores) == seen.classes[rows]).sum())
    return {
        "active_tasks": round(float(mask.sum(dim=1).float().mean()), 3),
        "coverage": round(float((mask & seen.truth).sum() / seen.truth.sum()), 4),
        "top1": round(hits / len(mask), 4),
    }


def table(
    model: Mantis, held: Seen, seen: Seen, limits: Sequence[int]
) -> Iterator[dict[str, float]]:
    """Yields one row with every task, then one row per limit and wanted coverage."""
    tasks = seen.p.shape[1]
    yield {"limit": tasks, "wanted": 1.0, **score(model, seen, torch.ones_like(seen.truth))}
    for limit in limits:
        for wanted in COVERAGES:
            threshold = coverage_threshold(held.p, held.truth, wanted, limit=limit)
            mask = select_mask(seen.p, threshold, limit)
            yield {"limit": limit, "wanted": wanted, **score(model, seen, mask)}


@one_message
def main() -> int:
    """Runs the client on both splits and prints all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("shards", help="folder that `mantis prepare` wrote for the model")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    if model.joint is None:
        parser.error(
            f"{arguments.model} has no top1, because its images have no single class: give a model "
            "whose images have one class each"
        )
    data = DataConfig.model_validate(read_meta(arguments.model)["preparation"]["data"])
    held, seen = (look(model, arguments.shards, data, split) for split in ("holdout", "val"))
    tasks = len(model.spec.tasks)
    limits = sorted({min(tasks, limit) for limit in (1, 2, 3, 4, 6, tasks)})
    rows = list(table(model, held, seen, limits))
    shown = Table(*rows[0])
    for row in rows:
        shown.add_row(*map(str, row.values()))
    Console(stderr=True).print(shown)
    print(json.dumps({"images": len(seen.classes), "rows": rows}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
