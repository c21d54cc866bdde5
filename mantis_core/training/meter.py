"""Sums and counts of figures over batches and workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mantis_core.tasks import Batch
from mantis_core.training.recipe import StepOutput


@dataclass
class Meter:
    """Sums and counts over batches; `figures` divides once, at the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    pixels: int = 1

    def add(self, output: StepOutput, pixels: int) -> None:
        """One batch of images of `pixels` pixels each."""
        self.count += output.count
        self.pixels = pixels
        sums = {"loss": output.loss.detach() * output.count, **output.sums}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def reduce(self) -> None:
        """Adds up the workers' sums and counts, where there are several."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        names = sorted(self.sums)
        device = next(iter(self.sums.values())).device if names else torch.device("cpu")
        values = [self.sums[name].double().reshape(()) for name in names]
        packed = torch.stack([*values, torch.tensor(float(self.count), device=device).double()])
        dist.all_reduce(packed)
        self.sums = {name: packed[i] for i, name in enumerate(names)}
        self.count = round(float(packed[-1]))

    def figures(self, prefix: str) -> dict[str, float]:
        """Means by name: `<prefix>/loss`, `/bits`, `/bpp`, `/top1` and the rest, as floats."""
        values = {name: float(value) for name, value in self.sums.items()}
        asked = values.pop("top1/asked", None)
        hits = values.pop("top1/hits", None)
        out = {f"{prefix}/{name}": value / max(1, self.count) for name, value in values.items()}
        if asked:
            out[f"{prefix}/top1"] = (hits or 0.0) / asked
        if f"{prefix}/bits" in out:
            out[f"{prefix}/bpp"] = out[f"{prefix}/bits"] / self.pixels
        return out


def consumed_rows(step: int, batch: Batch) -> Tensor:
    """Which row ids a step consumes: (B, 2) int64 of step and id."""
    return torch.stack([torch.full_like(batch.row_id, step), batch.row_id], dim=1)


def hash_of_rows(rows: Tensor) -> str:
    """SHA-256 of all (step, row id) of an epoch, (N, 2); their order within a step does not count.

    So it does not depend on how many workers shared the rows of a step.
    """
    pairs = rows.cpu().numpy().astype("<i8")
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return hashlib.sha256(ordered.tobytes()).hexdigest()


def gather_rows(rows: Tensor) -> Tensor:
    """All workers' (N, ...) tensors joined along the first dimension; as given without workers."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(_world())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(size) for size in sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def average_buffers(module: nn.Module) -> None:
    """Averages floating-point buffers (batch norm statistics) over workers."""
    if not (dist.is_available() and dist.is_initialized()) or _world() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point() and buffer.numel():
            dist.all_reduce(buffer)
            buffer.div_(_world())


def _world() -> int:
    return int(dist.get_world_size())
