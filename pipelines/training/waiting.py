"""Lets the workers of a training wait for one that has long work before its first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

ASK_S = 1.0  # between two questions whether all are done
Result = TypeVar("Result")


def all_do(work: Callable[[], Result], device: torch.device, world: int) -> Result:
    """Returns work(), once every one of `world` workers has done its own.

    A worker that waits in a collective operation is given up after `cluster.collective_timeout_s`.
    So a thread works, and the workers ask each other again and again. An error is raised by the
    worker whose work it is, when the others are done too.
    """
    if world == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            done = torch.tensor(int(future.done()), device=device)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done:
                return future.result()
            time.sleep(ASK_S)
