"""How workers meet on one machine: they find each other, and nobody outside finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.pipelines.experiment import paint, write_config
from tests.pipelines.processes import family, listening, runs
from tests.root import ROOT

SCAN_INTERVAL_S = 0.3
WORKER = """
import json, sys
import psutil, torch
import torch.distributed as dist
from pipelines.training.process_group import join, serve_store
rank = int(sys.argv[1])
port = int(sys.argv[2]) if rank else serve_store()
if not rank:
    print(port, flush=True)
join("gloo", rank, 2, port, 60)
value = torch.tensor([float(rank + 1)])
dist.all_reduce(value)
hosts = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}
dist.barrier()
print(json.dumps([value.item(), sorted(hosts)]), flush=True)
dist.destroy_process_group()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_workers_reduce_over_sockets_of_the_loopback_interface() -> None:
    with start("0") as first:
        assert first.stdout is not None
        with start("1", first.stdout.readline().strip()) as second:
            assert second.stdout is not None
            results = [json.loads(each.stdout.read()) for each in (first, second)]  # type: ignore[union-attr]
    assert [value for value, _ in results] == [3.0, 3.0]
    assert {host for _, hosts in results for host in hosts} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_process_of_a_local_run_listens_off_the_loopback_interface(tmp_path: Path) -> None:
    """Looked at all the time, from preparing data to registering the model."""
    paint(tmp_path / "images")
    config = write_config(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(config)]
    hosts: set[str] = set()
    trained = False
    with subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)}
    ) as driver:
        while True:
            processes = family([psutil.Process(driver.pid)])
            hosts |= listening(processes)
            trained |= any(runs(each, "RayTrainWorker") for each in processes)
            try:
                driver.wait(SCAN_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                continue
    assert driver.returncode == 0
    assert trained
    assert hosts == {"127.0.0.1"}
