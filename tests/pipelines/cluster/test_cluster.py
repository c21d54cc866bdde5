"""Preflight: what is refused before anything starts, and how a local Ray is sized and bound."""

import json
import math
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from pipelines.cluster import connect as cluster
from pipelines.cluster import preflight
from pipelines.cluster.connect import local_cpus
from pipelines.cluster.machine import usable_cpus
from pipelines.cluster.preflight import (
    Available,
    PreflightError,
    check_disk,
    check_machine,
    check_resources,
    check_room,
    check_room_for_data,
    cluster_address,
)
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import ClusterConfig

CONFIG = """
data: {sources: [{kind: shapes}]}
tasks: [{name: outline, classes_from: shapes}]
"""


@pytest.mark.parametrize(
    ("asked", "available", "data_cpus", "message"),
    [
        ({"workers": 4}, Available(2, 0), 0, r"4 x .* asks for 4 CPUs, and this machine has 2"),
        ({"workers": 2}, Available(2, 0), 1, r"and 1 for data \(cluster\.data_cpus\)"),
        (
            {"gpus_per_worker": 0.5, "workers": 2},
            Available(8, 4),
            0,
            "NCCL refuses that: set cluster.workers to 1",
        ),
        ({"gpus_per_worker": 1}, Available(8, 0), 0, "asks for 1 GPUs, and this machine has 0"),
        ({"workers": 9}, Available(8, 0, 4), 0, "the 4 nodes have 8"),
        ({}, Available(8, 0, 2), 0, r"storage\.root /here is a folder of one machine"),
        ({"autoscaling": True}, Available(8, 0), 0, r"s3://bucket/folder, or file:///folder"),
    ],
)
def test_more_than_there_is_gets_one_clear_message(
    asked: dict[str, object], available: Available, data_cpus: float, message: str
) -> None:
    with pytest.raises(PreflightError, match=message):
        check_resources(ClusterConfig(**asked), "/here", available, data_cpus=data_cpus)


def test_an_elastic_training_needs_room_for_its_fewest_workers_alone() -> None:
    check_resources(ClusterConfig(workers=(2, 8)), "/here", Available(3, 0), data_cpus=1)
    with pytest.raises(PreflightError, match=r"cluster\.workers 2 x .* asks for 2 CPUs"):
        check_resources(ClusterConfig(workers=(2, 8)), "/here", Available(2, 0), data_cpus=1)


@pytest.mark.parametrize(
    ("gpus", "asked", "address", "notes"),
    [(2, 0, None, 1), (2, 1, None, 0), (0, 0, None, 0), (2, 0, "10.0.0.1:6379", 0)],
)
def test_a_gpu_that_a_local_run_leaves_unused_is_noted(
    gpus: int,
    asked: float,
    address: str | None,
    notes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: gpus)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{CONFIG}cluster: {{gpus_per_worker: {asked}}}\n")
    settings = load_settings(path, [f"cluster.address={address}"] if address else [])
    found = preflight.unused_gpu(settings)
    assert len(found) == notes
    assert all("set cluster.gpus_per_worker=1" in note for note in found)


@pytest.mark.parametrize(
    ("bf16", "gpus", "address", "notes"),
    [(False, 0, None, 1), (True, 0, None, 0), (False, 1, None, 0), (False, 0, "10.0.0.1:6379", 0)],
)
def test_bf16_on_a_cpu_that_has_none_is_noted(
    bf16: bool,
    gpus: int,
    address: str | None,
    notes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(preflight, "has_bf16", lambda: bf16)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{CONFIG}stage1: {{amp: bf16}}\nteacher: {{training: {{amp: bf16}}}}\n")
    settings = load_settings(path, [f"cluster.address={address}"] if address else [])
    sections = ["teacher.training", "stage1", "stage2", "stage2"]
    found = preflight.slow_precision(settings, sections)
    assert len(found) == notes
    for note in found:
        assert note.startswith("teacher.training, stage1 compute in bf16")
        assert "Set teacher.training.amp=auto stage1.amp=auto" in note


def test_a_gpu_counts_only_if_processes_may_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [Path("/dev/nvidia0"), Path("/dev/nvidia1"), Path("/dev/nvidiactl")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(names))
    found = {}
    for shown in (None, "", "1", "0,1", "-1"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        found[shown] = preflight.visible_gpus()
    assert found == {None: 2, "": 0, "1": 1, "0,1": 2, "-1": 0}


SMALL = [Available(2, 0)] * 4


@pytest.mark.parametrize(
    ("asked", "nodes"),
    [
        ({"workers": 8}, SMALL),
        ({"workers": (1, 8), "cpus_per_worker": 1.5}, SMALL),
        ({"workers": (1, 4), "gpus_per_worker": 1}, [Available(16, 1)] * 4),
        ({"workers": (1, 2)}, [Available(3, 0)]),
    ],
)
def test_an_elastic_training_that_leaves_cpus_to_data_is_taken(
    asked: dict[str, object], nodes: list[Available]
) -> None:
    check_room_for_data(ClusterConfig(**asked), nodes, data_cpus=1)


def test_an_elastic_training_that_could_take_every_cpu_is_refused() -> None:
    with pytest.raises(PreflightError, match="grow until 0 CPUs are left, and data needs 1"):
        check_room_for_data(ClusterConfig(workers=(1, 6)), SMALL, data_cpus=1)


@pytest.mark.parametrize("root", ["s3://bucket/runs", "file:///mnt/shared"])
def test_several_nodes_may_share_a_uri(root: str) -> None:
    check_resources(ClusterConfig(workers=4), root, Available(8, 0, 2), data_cpus=1)


def test_a_machine_too_small_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    root = f"storage.root={tmp_path}/runs"
    check_machine(load_settings(path, [root]))
    with pytest.raises(PreflightError, match="asks for 5000 CPUs"):
        check_machine(load_settings(path, [root, "cluster.workers=5000"]))


def test_a_root_that_cannot_be_written_or_is_full_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"cannot be used: .*; set storage\.root"):
        check_disk(tmp_path / "file" / "runs")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(5 * 2**20))
    with pytest.raises(PreflightError, match="5 MiB free, 1024 are needed"):
        check_disk(tmp_path)
    with pytest.raises(PreflightError, match=f"disk of storage.root {tmp_path}"):
        check_room(str(tmp_path))
    monkeypatch.setattr(preflight.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PreflightError, match=f"disk of TMPDIR {tmp_path} .*set TMPDIR to"):
        check_room("memory://bucket/runs")


def test_an_address_is_taken_from_the_config_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(ClusterConfig()) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_address(ClusterConfig()) == "auto"
    assert cluster_address(ClusterConfig(address="ray-head:6379")) == "ray-head:6379"


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("machine", [1, 2, 16])
def test_a_local_ray_always_has_a_cpu_for_data(workers: int, machine: int) -> None:
    counted = local_cpus(ClusterConfig(workers=workers), machine)
    assert counted >= workers + 1
    assert counted == max(machine, workers + 1)
    assert local_cpus(ClusterConfig(workers=workers, data_cpus=0.5), machine) == math.ceil(
        workers + 0.5
    )


@pytest.mark.parametrize(("message", "starts"), [("timed out during startup", 2), ("no", 1)])
def test_a_ray_that_was_slow_to_start_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, message: str, starts: int
) -> None:
    import ray

    seen: list[str] = []

    def init(**arguments: object) -> None:
        seen.append("init")
        raise RuntimeError(f"The current node {message}.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append("shutdown"))
    with pytest.raises(RuntimeError, match=message):
        cluster._start({})
    assert seen == ["init", "shutdown", "init"][: 2 * starts - 1]


def test_a_local_ray_listens_on_loopback_only_and_ends_with_the_block(tmp_path: Path) -> None:
    code = """
import json, os, signal, sys, time
import psutil
from pipelines.cluster.connect import connect
from pipelines.settings.sections import ClusterConfig

def family():
    return psutil.Process().children(recursive=True)

def terminated(*_):
    pass

signal.signal(signal.SIGTERM, terminated)
with connect(ClusterConfig(object_store_mb=100), sys.argv[1]):
    import ray
    cpus = ray.cluster_resources()["CPU"]
    processes = [psutil.Process(), *family()]
    sockets = {c.laddr.ip for p in processes for c in p.net_connections("inet")
               if c.status == psutil.CONN_LISTEN}
    handler_kept = signal.getsignal(signal.SIGTERM) is terminated
    with connect(ClusterConfig(), sys.argv[1]):
        pass
    nested_kept = ray.is_initialized()
_, alive = psutil.wait_procs(processes[1:], timeout=20)
print(json.dumps({"cpus": cpus, "sockets": sorted(sockets), "handler_kept": handler_kept,
                  "nested_kept": nested_kept, "alive": len(alive)}))
"""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HOME": str(tmp_path)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found.pop("sockets")) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    expected = max(usable_cpus(), 2)
    assert found == {"cpus": expected, "handler_kept": True, "nested_kept": True, "alive": 0}
