"""Nodes: how many are requested and for how long, and what is tried on each before any work."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster import nodes
from pipelines.cluster.nodes import (
    bundles,
    check_nodes,
    driver_text,
    gpu_fault,
    node_fault,
    requests_taken_back,
    wait_for_nodes,
)
from pipelines.cluster.preflight import Available, PreflightError
from pipelines.settings.sections import ClusterConfig

ROOT = "s3://bucket/runs"
GPUS = ClusterConfig(
    autoscaling=True, workers=4, cpus_per_worker=6, gpus_per_worker=1, start_timeout_s=600
)


@pytest.mark.parametrize(
    ("cluster", "workers", "expected"),
    [
        (GPUS, 2, [{"CPU": 6, "GPU": 1}] * 2 + [{"CPU": 1}]),
        (GPUS, 0, [{"CPU": 1}]),
        (ClusterConfig(cpus_per_worker=0.5, data_cpus=2.5), 1, [{"CPU": 1}, {"CPU": 3}]),
        (ClusterConfig(cpus_per_worker=0, gpus_per_worker=1), 1, [{"GPU": 1}, {"CPU": 1}]),
    ],
)
def test_whole_resources_of_workers_and_data_tasks_are_requested(
    cluster: ClusterConfig, workers: int, expected: list[dict[str, int]]
) -> None:
    assert bundles(cluster, workers) == expected


class Scaling:
    """A cluster that gets a node of 8 CPUs and a GPU a minute, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.clock, self.most = 0.0, most
        self.requests: list[int] = []
        self.notes: list[str] = []
        monkeypatch.setattr(nodes, "_request", lambda asked: self.requests.append(len(asked)))
        monkeypatch.setattr(nodes, "cluster_nodes", self.alive)
        monkeypatch.setattr("data_prep.ray_data.data_nodes", lambda: [])
        monkeypatch.setattr(nodes.time, "sleep", self.sleep)

    def alive(self) -> list[Available]:
        joined = min(self.most, int(self.clock // 60))
        return [Available(0, 0), *[Available(8, 1)] * joined]

    def sleep(self, seconds: float) -> None:
        self.clock += 10

    def wait(self, workers: int) -> None:
        wait_for_nodes(GPUS, ROOT, workers, self.notes.append, now=lambda: self.clock)


def test_nodes_are_requested_again_as_long_as_they_are_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaling = Scaling(monkeypatch, most=4)
    scaling.wait(4)
    assert scaling.clock == 240
    assert scaling.requests == [5] * 25  # at each look: Ray Data may have overwritten the last
    assert scaling.notes[0] == (
        "waiting for nodes, 1 of at most 10 minutes: 25 CPUs and 4 GPUs are requested, and the 2 "
        "nodes have 8 CPUs and 1 GPUs"
    )
    assert len(scaling.notes) == 3  # one a minute


def test_a_cluster_that_cannot_grow_as_far_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaling = Scaling(monkeypatch, most=3)
    with pytest.raises(PreflightError, match=r"asks for 24 CPUs .*, and the 4 nodes have 24"):
        scaling.wait(4)
    assert 600 < scaling.clock <= 620


def test_a_fixed_cluster_that_is_too_small_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaling = Scaling(monkeypatch, most=3)
    fixed = GPUS.model_copy(update={"autoscaling": False})
    with pytest.raises(PreflightError):
        wait_for_nodes(fixed, ROOT, 4, scaling.notes.append)
    assert (scaling.requests, scaling.clock) == ([], 0)


@pytest.mark.parametrize("error", [None, PreflightError("too small"), KeyboardInterrupt()])
def test_requests_are_taken_back_whatever_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    scaling = Scaling(monkeypatch, most=1)

    def command(cluster: ClusterConfig) -> None:
        with requests_taken_back(cluster):
            if error is not None:
                raise error

    for cluster in (GPUS, ClusterConfig()):
        with contextlib.suppress(PreflightError, KeyboardInterrupt):
            command(cluster)
    assert scaling.requests == [0]  # a cluster that does not scale is asked for nothing


def requested() -> list[dict[str, int]]:
    """Returns what stands in Ray's own store."""
    from tests.ray_private import AUTOSCALER_RESOURCE_REQUEST_CHANNEL, _internal_kv_get

    found = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return json.loads(found) if found else []


def test_a_request_stands_in_rays_store_while_a_command_waits_and_is_gone_after_it(
    ray_session: Any,
) -> None:
    greedy = ClusterConfig(autoscaling=True, workers=999, start_timeout_s=2)
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            seen.append(len(requested()))

    watcher = threading.Thread(target=look)
    watcher.start()
    with pytest.raises(PreflightError, match="asks for 999 CPUs"), requests_taken_back(greedy):
        wait_for_nodes(greedy, ROOT, 999, lambda note: None)
    over.set()
    watcher.join()
    assert 1000 in seen
    assert requested() == []


@pytest.fixture
def slow_node(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "CHECK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(nodes, "node_fault", lambda root, gpu: time.sleep(30))


def test_every_node_is_tried_and_a_fault_names_the_node_and_the_remedy(
    ray_session: Any, tmp_path: Path
) -> None:
    check_nodes(ClusterConfig(), f"file://{tmp_path}/runs")
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"node [\d.]+: .*instance profile"):
        check_nodes(ClusterConfig(), f"file://{tmp_path}/file/runs")


def test_a_node_at_work_for_others_stops_nobody(slow_node: None) -> None:
    began = time.monotonic()
    check_nodes(ClusterConfig(), "/local")
    assert time.monotonic() - began < 20


def test_a_gpu_that_torch_cannot_use_is_a_fault_with_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    def refuse(*size: int, device: str) -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11020).\nPlease update"
        )

    monkeypatch.setattr(torch, "ones", refuse)
    fault = gpu_fault()
    assert fault is not None
    assert "too old (found version 11020). No NVIDIA driver is loaded there: start nodes" in fault
    assert node_fault(None, gpu=True) == fault
    assert node_fault(None, gpu=False) is None


def test_the_driver_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    for line, version in {
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024": "535.183.01",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release": "580.65.06",
        "NVRM version: something else": "unknown",
    }.items():
        file.write_text(f"{line}\nGCC version: 12\n")
        assert driver_text(str(file)) == f"The version of its NVIDIA driver is {version}"
