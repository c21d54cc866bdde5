"""Sums and counts of figures over batches and workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mantis_core.tasks import Batch
from mantis_core.training.means import Name, Pool, add_up, num_workers
from mantis_core.training.recipe import StepOutput


@dataclass
class Meter:
    """Sums and counts over batches; `figures` divides once, at the end.

    `device` is where the workers' process group works.
    """

    device: torch.device | str = "cpu"
    sums: dict[str, Tensor] = field(default_factory=dict)
    pool: Pool = field(default_factory=Pool)
    count: int = 0
    pixels: int = 1

    def add(self, output: StepOutput, pixels: int) -> None:
        """One batch of images of `pixels` pixels each."""
        self.count += output.count
        self.pixels = pixels
        sums = {"loss": output.loss.detach() * output.count, **output.sums}
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.pool.add(output.objectives)

    def reduce(self) -> None:
        """Adds up the workers' sums and counts, where there are several.

        Every worker must call it, also one that had no batch: all end with the same figures.
        """
        if num_workers() == 1:
            return
        own: dict[Name, Tensor] = {
            ("sum", name): value.reshape(1) for name, value in self.sums.items()
        }
        for name, number in (("images", self.count), ("pixels", self.count * self.pixels)):
            own[name,] = torch.tensor([number], dtype=torch.float64, device=self.device)
        totals = add_up(own, 1, self.device)
        self.count = round(float(totals.pop(("images",))))
        self.pixels = round(float(totals.pop(("pixels",)))) // max(1, self.count)
        self.sums = {name: total[0] for (_, name), total in totals.items()}
        self.pool.reduce(self.device)

    def figures(self, prefix: str) -> dict[str, float]:
        """Means by name: `<prefix>/loss`, `/bits`, `/bpp`, `/top1` and the rest, as floats.

        The loss and its terms are those of the step outputs, each over its images; of objectives
        where outputs have them, over all rows.
        """
        each = [value.double() for value in self.sums.values()]
        sums = torch.stack(each).tolist() if each else []  # a GPU is waited for once
        values = dict(zip(self.sums, sums, strict=True))
        asked = values.pop("top1/asked", None)
        hits = values.pop("top1/hits", None)
        out = {f"{prefix}/{name}": value / max(1, self.count) for name, value in values.items()}
        out |= {f"{prefix}/{name}": value for name, value in self.pool.figures().items()}
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
