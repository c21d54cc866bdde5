"""Checks a machine and a cluster before any work starts."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from pipelines.cluster.machine import has_bf16, usable_cpus
from pipelines.settings.sections import ClusterConfig, Settings
from pipelines.storage import is_shared, local_root

MIN_FREE_BYTES = 2**30


class PreflightError(ValueError):
    """Raised before any work starts if the machine or cluster cannot run the config."""

    exit_code = 2


@dataclass(frozen=True)
class Available:
    """The resources of a node, or the sum over several nodes."""

    cpus: float
    gpus: float
    nodes: int = 1


def cluster_address(cluster: ClusterConfig) -> str:
    """Returns the address of the cluster to join, or "local" to start Ray on this machine."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def check_machine(settings: Settings) -> None:
    """Checks the CPUs of a local run and the disk before Ray starts. Raises PreflightError."""
    root = settings.storage.root
    if cluster_address(settings.cluster) == "local":
        available = Available(usable_cpus(), math.inf)
        check_resources(settings.cluster, root, available, data_cpus=0)
    check_room(root)


def visible_gpus() -> int:
    """Returns the number of NVIDIA GPUs that processes on this machine see. Loads no torch."""
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return len(devices)
    named = [each for each in shown.split(",") if each.strip() not in ("", "-1")]
    return min(len(devices), len(named))


def unused_gpu(settings: Settings) -> list[str]:
    """Returns a note if a run with Ray on this machine leaves its GPU unused."""
    cluster = settings.cluster
    gpus = visible_gpus() if cluster_address(cluster) == "local" else 0
    if cluster.gpus_per_worker or not gpus:
        return []
    return [
        f"this machine has {gpus} {'GPU' if gpus == 1 else 'GPUs'} and the run uses none: set "
        "cluster.gpus_per_worker=1 to train and measure on a GPU"
    ]


def slow_precision(settings: Settings, sections: Sequence[str]) -> list[str]:
    """Returns a note if these trainings compute in bfloat16 on a CPU that is slow at it.

    `sections` are the dotted names of their settings. Says nothing of the CPUs of a cluster, or
    where a GPU may be used.
    """
    on_gpu = settings.cluster.gpus_per_worker or visible_gpus()
    if on_gpu or cluster_address(settings.cluster) != "local" or has_bf16():
        return []
    slow = [name for name in dict.fromkeys(sections) if attrgetter(name)(settings).amp == "bf16"]
    if not slow:
        return []
    return [
        f"{', '.join(slow)} compute in bf16, for which this machine's CPU has no instructions: "
        "a step takes tens of times as long as in float32. Set "
        + " ".join(f"{name}.amp=auto" for name in slow)
        + ", which has bf16 on GPUs alone"
    ]


def check_resources(
    cluster: ClusterConfig,
    root: str,
    available: Available,
    *,
    data_cpus: float,
    workers: int | None = None,
) -> None:
    """Raises PreflightError if the training workers and the data tasks do not fit.

    `workers` is by default the fewest of a training.
    """
    workers = cluster.min_workers if workers is None else workers
    asked_cpus = workers * cluster.cpus_per_worker
    asked_gpus = workers * cluster.gpus_per_worker
    where = "this machine has" if available.nodes == 1 else f"the {available.nodes} nodes have"
    if asked_cpus + data_cpus > available.cpus:
        beside = f" and {data_cpus:g} for data (cluster.data_cpus)" if data_cpus else ""
        raise PreflightError(
            f"cluster.workers {workers} x cluster.cpus_per_worker "
            f"{cluster.cpus_per_worker:g} asks for {asked_cpus:g} CPUs{beside}, and {where} "
            f"{available.cpus:g}: lower them, or join a larger cluster with cluster.address"
        )
    if asked_gpus > available.gpus:
        raise PreflightError(
            f"cluster.workers {workers} x cluster.gpus_per_worker "
            f"{cluster.gpus_per_worker:g} asks for {asked_gpus:g} GPUs, and {where} "
            f"{available.gpus:g}: lower them (0 trains on CPUs), or join a cluster that has them"
        )
    if 0 < cluster.gpus_per_worker < 1 and cluster.max_workers > 1:
        raise PreflightError(
            f"cluster.gpus_per_worker {cluster.gpus_per_worker:g} puts several of the "
            f"{cluster.max_workers} workers on one GPU, and NCCL refuses that: set "
            "cluster.workers to 1, or cluster.gpus_per_worker to 1"
        )
    several = available.nodes > 1 or cluster.autoscaling
    if several and not is_shared(root):
        raise PreflightError(
            f"storage.root {root} is a folder of one machine, but the cluster has several nodes: "
            "give a URI that all of them reach, such as s3://bucket/folder, or file:///folder if "
            "that folder is mounted on every node"
        )


def check_room_for_data(
    cluster: ClusterConfig, nodes: Sequence[Available], *, data_cpus: float
) -> None:
    """Raises PreflightError if an elastic training could take the CPUs of its data tasks.

    Ray starts as many workers as fit, up to the maximum. Without free CPUs the data tasks that feed
    them would wait forever. Not needed in a cluster with data nodes (`ray-subcluster: data`).
    """
    if cluster.min_workers == cluster.max_workers or not cluster.cpus_per_worker:
        return
    left = 0.0
    for node in nodes:
        fit = node.cpus // cluster.cpus_per_worker
        if cluster.gpus_per_worker:
            fit = min(fit, node.gpus // cluster.gpus_per_worker)
        left += node.cpus - min(fit, cluster.max_workers) * cluster.cpus_per_worker
    if left < data_cpus:
        raise PreflightError(
            f"cluster.workers [{cluster.min_workers}, {cluster.max_workers}] may grow until "
            f"{left:g} CPUs are left, and data needs {data_cpus:g} (cluster.data_cpus): start "
            "nodes with the label ray-subcluster=data, give a fixed number of workers, or set "
            "cluster.cpus_per_worker so that each node keeps free CPUs"
        )


def check_room(root: str) -> None:
    """Raises PreflightError if a command has no room for its files on this machine.

    A local `root` takes all of them. With a remote one the large temporary files lie in TMPDIR.
    """
    folder = local_root(root)
    if folder is not None:
        check_disk(folder)
    else:
        check_disk(Path(tempfile.gettempdir()), "TMPDIR")


def check_disk(folder: Path, setting: str = "storage.root") -> None:
    """Raises PreflightError if the folder cannot be written or its disk is nearly full.

    `setting` is the name of what sets the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PreflightError(
            f"{setting} {folder} cannot be used: {error.strerror}; set {setting} to a "
            "folder that can be written"
        ) from error
    if not os.access(folder, os.W_OK):
        raise PreflightError(
            f"{setting} {folder} is not writable; set {setting} to a folder that is"
        )
    if free < MIN_FREE_BYTES:
        raise PreflightError(
            f"the disk of {setting} {folder} has {free / 2**20:.0f} MiB free, "
            f"{MIN_FREE_BYTES / 2**20:.0f} are needed: free some space, or set {setting} to "
            "another disk"
        )
