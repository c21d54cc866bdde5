"""Starts or joins Ray, once per command, after checking that what is asked for can be had."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.settings import ClusterConfig, Settings
from pipelines.storage import Store, is_shared

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 2**30
TRACKING_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
POLL_INTERVAL_S = 1.0


class PreflightError(ValueError):
    """What is asked for cannot be had here; told before anything starts."""

    exit_code = 2


@dataclass(frozen=True)
class Available:
    """What a node, or a cluster of several, has."""

    cpus: float
    gpus: float
    nodes: int = 1


def cluster_nodes() -> list[Available]:
    """What each node that is alive has. Ray must be connected."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Available(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def together(nodes: Sequence[Available]) -> Available:
    """What these nodes have in all."""
    return Available(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), len(nodes))


def cluster_address(cluster: ClusterConfig) -> str:
    """ "local" to start Ray here, else the address to join."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def on_this_node() -> Any:
    """The scheduling strategy of an actor that serves this process: where its node is lost, so is
    whom it serves. Ray would put it anywhere. Ray must be connected."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_machine(settings: Settings) -> None:
    """What can be told before Ray starts: CPUs of a local run, disk, tracking. PreflightError."""
    root = settings.storage.root
    if cluster_address(settings.cluster) == "local":
        cpus = len(os.sched_getaffinity(0))
        check_resources(settings.cluster, root, Available(cpus, math.inf), data_cpus=0)
    folder = Store(root).local_path()
    if folder is not None:
        check_disk(folder)
    uri = settings.tracking.uri if settings.tracking.enabled else None
    if uri and re.split(r"[:+]", uri)[0] not in TRACKING_SCHEMES:
        raise PreflightError(
            f"tracking.uri is {uri!r}; MLflow is reached by {', '.join(TRACKING_SCHEMES)}. "
            "Leave it out for a sqlite file under storage.root."
        )


def check_resources(
    cluster: ClusterConfig, root: str, available: Available, *, data_cpus: float
) -> None:
    """Raises PreflightError unless the fewest training workers, and data beside them, fit."""
    asked_cpus = cluster.min_workers * cluster.cpus_per_worker
    asked_gpus = cluster.min_workers * cluster.gpus_per_worker
    where = "this machine has" if available.nodes == 1 else f"the {available.nodes} nodes have"
    if asked_cpus + data_cpus > available.cpus:
        beside = f" and {data_cpus:g} for data (cluster.data_cpus)" if data_cpus else ""
        raise PreflightError(
            f"cluster.workers {cluster.min_workers} x cluster.cpus_per_worker "
            f"{cluster.cpus_per_worker:g} asks for {asked_cpus:g} CPUs{beside}, and {where} "
            f"{available.cpus:g}: lower them, or join a larger cluster with cluster.address"
        )
    if asked_gpus > available.gpus:
        raise PreflightError(
            f"cluster.workers {cluster.min_workers} x cluster.gpus_per_worker "
            f"{cluster.gpus_per_worker:g} asks for {asked_gpus:g} GPUs, and {where} "
            f"{available.gpus:g}: lower them (0 trains on CPUs), or join a cluster that has them"
        )
    several = available.nodes > 1 or cluster.autoscaling
    if several and not is_shared(root):
        raise PreflightError(
            f"storage.root {root} is a folder of one machine, but the cluster "
            "has several nodes: give a URI all of them reach, s3://bucket/folder, or "
            "file:///folder if that folder is mounted on every node"
        )


def check_room_for_data(
    cluster: ClusterConfig, nodes: Sequence[Available], *, data_cpus: float
) -> None:
    """Raises PreflightError where an elastic training could grow over every CPU of `nodes`.

    Ray starts as many workers as fit, up to the most; the data tasks that feed them would then
    wait for ever. `nodes` are those without the label of data nodes; with such
    nodes in the cluster there is nothing to check."""
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
            f"cluster.workers {list(cluster.workers)} may grow until {left:g} CPUs are left, and "
            f"data needs {data_cpus:g} (cluster.data_cpus): start nodes with the label "
            "ray-subcluster=data, give a number of workers, or set cluster.cpus_per_worker so "
            "that some of each node's CPUs stay free"
        )


def check_disk(folder: Path) -> None:
    """Raises PreflightError if the folder cannot be written or its disk is nearly full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PreflightError(
            f"storage.root {folder} cannot be used: {error.strerror}; set storage.root"
        ) from error
    if not os.access(folder, os.W_OK):
        raise PreflightError(f"storage.root {folder} is not writable; set storage.root")
    if free < MIN_FREE_BYTES:
        raise PreflightError(
            f"the disk of storage.root {folder} has {free / 2**20:.0f} MiB free, "
            f"{MIN_FREE_BYTES / 2**20:.0f} are needed: free some, or set storage.root elsewhere"
        )


@contextlib.contextmanager
def connect(cluster: ClusterConfig, root: str) -> Iterator[None]:
    """Ray is there inside the block, with all `cluster` asks for; `root` is the storage root.

    A Ray started here listens on the loopback interface only and ends with the block. A process
    that already uses Ray keeps it. Raises PreflightError.
    """
    with environment(_ray_environment(cluster)):
        yield from _connected(cluster, root)


def local_cpus(cluster: ClusterConfig, machine_cpus: int) -> int:
    """CPUs a local Ray counts with: the machine's, and as many more as data needs beside training.

    On a small machine training workers take every CPU; without a share of their own the data tasks
    that feed them would wait for ever.
    """
    training = cluster.max_workers * cluster.cpus_per_worker
    data = cluster.data_cpus or max(1.0, machine_cpus - training)
    return math.ceil(training + data)


def _connected(cluster: ClusterConfig, root: str) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster_address(cluster)
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        _start(_init_arguments(cluster, address))
    except ConnectionError as error:
        raise PreflightError(
            f"there is no Ray cluster at {address}: {error}. Set cluster.address or RAY_ADDRESS "
            "to a running one, or unset both to start Ray here."
        ) from error
    try:
        with contextlib.suppress(ValueError):  # only the main thread may, and only it is asked to
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)
        _wait_for_resources(cluster, root, local=address == "local")
        yield
    finally:
        ray.shutdown()


def _start(arguments: dict[str, Any]) -> None:
    """Ray gives its processes 30 s to start and knows no setting for it; a busy machine gets 60."""
    import ray

    try:
        ray.init(**arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        logger.warning("Ray took over 30 s to start; trying once more")
        ray.shutdown()
        ray.init(**arguments)


def _init_arguments(cluster: ClusterConfig, address: str) -> dict[str, Any]:
    if address != "local":
        return {"address": address, "log_to_driver": True}
    return {
        "address": "local",
        "num_cpus": local_cpus(cluster, len(os.sched_getaffinity(0))),
        "object_store_memory": cluster.object_store_mb * 10**6,
        "include_dashboard": False,
        "log_to_driver": True,
    }


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block; what the user has set stands."""
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _ray_environment(cluster: ClusterConfig) -> dict[str, str]:
    """What Ray reads when it is imported and started."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(cluster.collective_timeout_s),
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # A command whose cluster has lost its head ends after this many seconds, and says so.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
    }
    if cluster_address(cluster) == "local":
        wanted |= {
            "RAY_AUTH_MODE": "token",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            # Despite its name, on Linux too: 0 keeps every Ray process on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    return wanted


def _wait_for_resources(
    cluster: ClusterConfig, root: str, *, local: bool, now: Callable[[], float] = time.monotonic
) -> None:
    """Asks an autoscaling cluster for nodes and waits for them; any other must have them now."""
    from data_prep.ray_data import data_nodes

    data_cpus = 0.0 if local else cluster.data_cpus or 1.0
    deadline = now() + cluster.start_timeout_s
    if cluster.autoscaling:
        from ray.autoscaler.sdk import request_resources

        worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
        bundle = {name: math.ceil(amount) for name, amount in worker.items() if amount}
        request_resources(bundles=[bundle] * cluster.min_workers + [{"CPU": math.ceil(data_cpus)}])
    while True:
        try:
            nodes = cluster_nodes()
            check_resources(cluster, root, together(nodes), data_cpus=data_cpus)
            if not data_nodes():
                check_room_for_data(cluster, nodes, data_cpus=data_cpus)
            return
        except PreflightError:
            if not cluster.autoscaling or now() > deadline:
                raise
        time.sleep(POLL_INTERVAL_S)
