"""What detection costs: top1 and coverage of a trained codec by how many tasks it may send.

    python -m benchmarks.detection MODEL SHARDS

MODEL is a checkpoint folder, SHARDS the folder `mantis prepare` wrote for it. Each row calibrates
the mask anew, on the held-back rows, for one limit on active tasks and one wanted coverage, as
training does, and then scores the validation split with the probabilities as the stream would carry
them. Symbols are rounded, not coded: the coder changes none. The last line is one JSON object; its
first row decodes every task.
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
from data_prep.reader import local_batches
from data_prep.schema import DataConfig, read_manifest
from mantis_core.checkpoint import load_model, read_meta
from mantis_core.client import coverage_threshold, select_mask
from mantis_core.model import Mantis
from mantis_core.preprocessing import normalise
from mantis_core.task_field import dequantise_level, quantise_log2

COVERAGES = (0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Seen:
    """A split through the client: p (N, K), true tasks (N, K), classes (N,), rounded latents."""

    p: Tensor
    truth: Tensor
    classes: Tensor
    latent: Tensor


@torch.no_grad()
def look(model: Mantis, shards: str, data: DataConfig, split: str) -> Seen:
    """Every image of a split as the client sees it."""
    parts: list[tuple[Tensor, ...]] = []
    manifest = read_manifest(shards)
    for batch in local_batches(shards, manifest, data, split=split, global_batch=128, threads=1):
        images = normalise(torch.from_numpy(batch["image"]))
        view = model.client(images)
        p = torch.sigmoid(view.logits.float())
        latent = model.client.encode(view, p)
        truth, classes = (
            torch.from_numpy(batch["task_mask"]),
            torch.from_numpy(batch["class_label"]),
        )
        parts.append((p, truth, classes, latent.round()))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def as_sent(p: Tensor, mask: Tensor, *, levels: bool) -> Tensor:
    """What a stream says of the tasks, (N, K): p in half-bit steps where `mask`, else 0.

    Without `levels`, which a stream may leave out, 1 where active.
    """
    if not levels:
        return mask.float()
    return p.clone().apply_(lambda value: dequantise_level(quantise_log2(value))) * mask


@torch.no_grad()
def score(model: Mantis, seen: Seen, mask: Tensor) -> dict[str, float]:
    """Top1 of the joint decision over the tasks in `mask` (N, K), and what that mask holds."""
    assert model.joint is not None
    levels = model.spec.model.send_probabilities
    size, hits = model.spec.image_size, 0
    for rows in torch.arange(len(mask)).split(128):
        sent = as_sent(seen.p[rows], mask[rows], levels=levels)
        scores = model.joint(model.server(seen.latent[rows], size), sent.log())
        hits += int((scores.argmax(dim=1) == seen.classes[rows]).sum())
    return {
        "active_tasks": round(float(mask.sum(dim=1).float().mean()), 3),
        "coverage": round(float((mask & seen.truth).sum() / seen.truth.sum()), 4),
        "top1": round(hits / len(mask), 4),
    }


def table(
    model: Mantis, held: Seen, seen: Seen, limits: Sequence[int]
) -> Iterator[dict[str, float]]:
    """One row with every task, then one a limit and coverage."""
    tasks = seen.p.shape[1]
    yield {"limit": tasks, "wanted": 1.0, **score(model, seen, torch.ones_like(seen.truth))}
    for limit in limits:
        for wanted in COVERAGES:
            threshold = coverage_threshold(held.p, held.truth, wanted, limit=limit)
            mask = select_mask(seen.p, threshold, limit)
            yield {"limit": limit, "wanted": wanted, **score(model, seen, mask)}


@one_message
def main() -> int:
    """Looks at both splits once and prints all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("shards")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    if model.joint is None:
        parser.error(f"{arguments.model}: its images have no single class, so there is no top1")
    data = DataConfig.model_validate(read_meta(arguments.model)["preparation"]["data"])
    held, seen = (look(model, arguments.shards, data, split) for split in ("holdout", "val"))
    tasks = len(model.spec.tasks)
    limits = sorted({min(tasks, limit) for limit in (1, 2, 3, 4, 6, tasks)})
    rows = list(table(model, held, seen, limits))
    shown = Table(*rows[0])
    for row in rows:
        shown.add_row(*map(str, row.values()))
    Console(stderr=True).print(shown)
    print(json.dumps({"images": len(seen.classes), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
