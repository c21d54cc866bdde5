"""Workers wait for the slowest of them for longer than a collective operation may take."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.training import waiting
from pipelines.training.waiting import all_do

TIMEOUT_S = 2.0
CPU = torch.device("cpu")


def test_one_worker_works_and_goes_on() -> None:
    assert all_do(lambda: 7, CPU, world=1) == 7


def worker(rank: int, folder: str, broken: bool, results: Any) -> None:
    def work() -> int:
        if rank == 1:
            time.sleep(2 * TIMEOUT_S)
            if broken:
                raise ValueError("no disk")
        return rank

    waiting.ASK_S = 0.1
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    began = time.monotonic()
    try:
        said: Any = all_do(work, CPU, world=2)
    except ValueError as error:
        said = str(error)
    results.put((rank, said, time.monotonic() - began))


@pytest.mark.parametrize(("broken", "said"), [(False, [0, 1]), (True, [0, "no disk"])])
def test_workers_wait_for_the_slowest_beyond_the_timeout(
    broken: bool, said: list[Any], tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    workers = [
        fork.Process(target=worker, args=(rank, str(tmp_path), broken, results)) for rank in (0, 1)
    ]
    for process in workers:
        process.start()
    found = sorted((results.get(timeout=60) for _ in workers), key=lambda result: result[0])
    for process in workers:
        process.join()
    assert [result[1] for result in found] == said
    assert min(result[2] for result in found) > TIMEOUT_S
