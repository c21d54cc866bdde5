"""Means over all rows, however workers and batches share the rows.

A mean is kept as its value on some rows and the number of entries behind it. Parts are joined by
these numbers: an average of averages would depend on who sits beside whom.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mantis_core.tasks import Batch

Io = Mapping[str, Any]
Name = tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """A mean over some entries of a batch, such as the images of one task.

    `value` () is in the graph, and 0 where there are no entries. `count`, a number or () without a
    gradient, says how many entries there are; for a quotient it is the divisor. Both may be (N,):
    N means side by side, as of N tasks.
    """

    value: Tensor
    count: Tensor | int

    def times(self, factor: float | Tensor) -> Mean:
        """The same entries, each `factor` times as large."""
        if isinstance(factor, (int, float)) and factor == 1:
            return self
        return Mean(factor * self.value, self.count)

    def apart(self) -> list[Mean]:
        """The means along the last dimension, each by itself; the count is a tensor."""
        assert isinstance(self.count, Tensor)
        pairs = zip(self.value.unbind(-1), self.count.unbind(-1), strict=True)
        return [Mean(value, count) for value, count in pairs]


def as_factors(shares: Tensor | None, like: Tensor) -> Tensor:
    """What the means of K tasks are multiplied by, (K,): `shares`, or 1 each; `like` is (B, K)."""
    return like.new_ones(like.shape[1], dtype=torch.float32) if shares is None else shares


class Criterion(nn.Module):
    """A loss term of what a recipe computed: the sum of means, each over entries of its own."""

    reads_teacher = False  # the teacher's logits, which are not made if no term reads them

    def means(self, student: Io, teacher: Io, batch: Batch) -> list[Mean]:
        """The means on these rows; as many for every batch, at the same places."""
        raise NotImplementedError

    def forward(self, student: Io, teacher: Io, batch: Batch) -> Tensor:
        """Their sum (), the term's value on these rows alone; 0 where nothing is compared."""
        values = [mean.value.sum() for mean in self.means(student, teacher, batch)]
        return torch.stack(values).sum() if values else torch.zeros((), device=batch.image.device)


@dataclass(frozen=True)
class Objective:
    """What is minimised on images: terms, each a weight and a sum of means, and the weighted rate.

    Several objectives of one batch have names. `share` is the part of the images that an objective
    is about; None stands for all.
    """

    terms: Mapping[str, tuple[float, Sequence[Mean]]]
    rate: Mean | None = None
    share: Mean | None = None
    name: str = ""

    def means(self) -> Iterator[Mean]:
        """The means of the terms and of the rate, in order."""
        for _, means in self.terms.values():
            yield from means
        if self.rate is not None:
            yield self.rate

    def mapped(self, change: Callable[[Mean], Mean]) -> Objective:
        """The objective with `change` made to each of `means`, in order."""
        terms = {
            name: (weight, [change(mean) for mean in means])
            for name, (weight, means) in self.terms.items()
        }
        return replace(self, terms=terms, rate=None if self.rate is None else change(self.rate))


def loss_of(objectives: Sequence[Objective]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () of one batch, and each weighted term () by name, both in the graph."""
    losses: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    for objective in objectives:
        totals = [_total(means) for _, means in objective.terms.values()]
        weights = [weight for weight, _ in objective.terms.values()]
        own = dict(zip(objective.terms, torch._foreach_mul(totals, weights), strict=True))
        loss = torch.stack([value.float() for value in own.values()]).sum()
        if objective.rate is not None:
            loss = loss + objective.rate.value
        if objective.share is not None:
            loss = loss * objective.share.value
            own = {name: value * objective.share.value for name, value in own.items()}
        losses.append(loss)
        for name, value in own.items():
            terms[name] = terms[name] + value if name in terms else value
    return (losses[0] if len(losses) == 1 else torch.stack(losses).sum()), terms


def loss_over_workers(objectives: Sequence[Objective]) -> tuple[Tensor, dict[str, Tensor]]:
    """As `loss_of`, but of the rows of all workers: this worker's part times their number.

    So the average over the workers, which DistributedDataParallel takes of gradients, is what one
    worker would have with all rows. If the loss of any worker is not finite, all get that loss.
    Costs one all-reduce of a few numbers; every worker must call it.
    """
    workers = num_workers()
    if workers == 1:
        return loss_of(objectives)
    with torch.no_grad():
        means = [mean for objective in objectives for mean in objective.means()]
        shares = [each.share for each in objectives if each.share is not None]
        sizes = [mean.value.numel() for mean in means]
        counts = torch.cat([_number(mean).flatten() for mean in (*means, *shares)])
        values = torch.cat([mean.value.double().flatten() for mean in (*means, *shares)])
        parts = (values * counts)[sum(sizes) :]
        alarm = values.sum()
        alarm = torch.where(alarm.isfinite(), torch.zeros_like(alarm), alarm)
        packed = torch.cat([counts, parts, alarm[None]])
        dist.all_reduce(packed)
        totals, alarm = packed[: len(counts)].clamp_min(_SMALLEST), packed[-1]
        factor = torch.split((workers * counts / totals).float()[: sum(sizes)], sizes)
        factors = (own.view_as(mean.value) for own, mean in zip(factor, means, strict=True))
        whole = iter((packed[len(counts) : -1] / totals[sum(sizes) :]).float().unbind())
    joined = [
        replace(
            objective.mapped(lambda mean: mean.times(next(factors))),
            share=None if objective.share is None else Mean(next(whole), objective.share.count),
        )
        for objective in objectives
    ]
    loss, terms = loss_of(joined)
    return torch.where(alarm == 0, loss, alarm.to(loss.dtype)), terms


@dataclass
class Pool:
    """Objectives of many batches, as sums of value * count and of count; divided at the end."""

    sums: dict[Name, Tensor] = field(default_factory=dict)

    def add(self, objectives: Sequence[Objective]) -> None:
        """One batch; the same means stand at the same places in every batch."""
        for objective in objectives:
            for term, (weight, means) in objective.terms.items():
                for place, mean in enumerate(means):
                    self._add((objective.name, _TERM, term, str(place)), mean.times(weight))
            for kind, own in ((_RATE, objective.rate), (_SHARE, objective.share)):
                if own is not None:
                    self._add((objective.name, kind), own)

    def _add(self, name: Name, mean: Mean) -> None:
        count = _number(mean)
        pair = torch.stack([mean.value.detach().double() * count, count])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self, device: torch.device | str) -> None:
        """Adds up the sums of all workers; every worker must call it, also one without a batch."""
        each = {
            (*name, str(place)): pair
            for name, pairs in self.sums.items()
            for place, pair in enumerate(pairs.reshape(2, -1).unbind(1))
        }
        self.sums = add_up(each, 2, device)

    def figures(self) -> dict[str, float]:
        """The loss over all rows as "loss", and each weighted term as "loss/<term>"."""
        if not self.sums:
            return {}
        pairs = [pairs.reshape(2, -1) for pairs in self.sums.values()]
        names = [name for name, own in zip(self.sums, pairs, strict=True) for _ in own[0]]
        sums, counts = torch.cat(pairs, dim=1)
        means = (sums / counts.clamp_min(_SMALLEST)).tolist()
        by_name = list(zip(names, means, strict=True))
        shares = {name[0]: mean for name, mean in by_name if name[1] == _SHARE}
        figures: dict[str, float] = defaultdict(float)
        for (objective, kind, *term), mean in by_name:
            if kind != _SHARE:
                value = mean * shares.get(objective, 1.0)
                figures["loss"] += value
                if kind == _TERM:
                    figures[f"loss/{term[0]}"] += value
        return dict(figures)


def add_up(
    own: Mapping[Name, Tensor], width: int, device: torch.device | str
) -> dict[Name, Tensor]:
    """Sums over all workers of vectors (width,) by name, in float64.

    A worker may lack names that others have. Every worker must call it; `device` is that of the
    workers' process group.
    """
    if num_workers() == 1:
        return dict(own)
    text = "".join(f"{json.dumps(name)}\n" for name in own).encode()
    letters = gather_rows(torch.tensor(list(text), dtype=torch.uint8, device=device))
    lines = bytes(letters.tolist()).decode().splitlines()
    names = sorted({tuple(json.loads(line)) for line in lines})
    if not names:
        return {}
    nothing = torch.zeros(width, dtype=torch.float64, device=device)
    packed = torch.stack([own.get(name, nothing).double() for name in names])
    dist.all_reduce(packed)
    return dict(zip(names, packed, strict=True))


_TERM, _RATE, _SHARE = "term", "rate", "share"
_SMALLEST = torch.finfo(torch.float64).tiny  # no division by 0, and a count over itself is 1


def _total(means: Sequence[Mean]) -> Tensor:
    values = [mean.value.sum() if mean.value.ndim else mean.value for mean in means]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _number(mean: Mean) -> Tensor:
    """The count as a float64 tensor beside the value, of its shape."""
    if isinstance(mean.count, Tensor):
        return mean.count.detach().double().expand_as(mean.value)
    return torch.full_like(mean.value, mean.count, dtype=torch.float64, requires_grad=False)


def num_workers() -> int:
    """How many processes train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return int(dist.get_world_size())


def gather_rows(rows: Tensor) -> Tensor:
    """All workers' (N, ...) tensors joined along the first dimension; N may be 0 and may differ."""
    if num_workers() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(num_workers())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(size) for size in sizes)
    if longest == 0:
        return rows
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def average_buffers(module: nn.Module) -> None:
    """Averages floating-point buffers (batch norm statistics) over workers."""
    if num_workers() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point() and buffer.numel():
            dist.all_reduce(buffer)
            buffer.div_(num_workers())
