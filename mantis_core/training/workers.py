"""What the workers of a training exchange beside gradients; nothing where a process is alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
