"""Starts or joins Ray once per command and checks that it has the resources of the config."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.cluster.machine import ray_temp_folder, token_file, usable_cpus
from pipelines.cluster.preflight import (
    Available,
    PreflightError,
    check_resources,
    check_room_for_data,
    cluster_address,
)
from pipelines.settings.sections import ClusterConfig

logger = logging.getLogger(__name__)
POLL_INTERVAL_S = 1.0


def cluster_nodes() -> list[Available]:
    """Returns the resources of each live node. Ray must be connected."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Available(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def together(nodes: Sequence[Available]) -> Available:
    """Returns the summed resources of the nodes."""
    return Available(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), len(nodes))


def on_this_node() -> Any:
    """Returns the scheduling strategy that pins an actor to the node of this process.

    An actor that serves this process must not depend on another node, where Ray could place it by
    default. Ray must be connected.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextlib.contextmanager
def connect(cluster: ClusterConfig, root: str) -> Iterator[None]:
    """Connects to Ray inside the block, with the resources of `cluster`. `root` is `storage.root`.

    A Ray started here listens on the loopback interface only and ends with the block. If this
    process is already connected, nothing changes. Raises PreflightError if resources are missing.
    """
    with environment(_ray_environment(cluster)):
        yield from _connected(cluster, root)


def local_cpus(cluster: ClusterConfig, machine_cpus: int) -> int:
    """Returns the logical CPUs of a local Ray: those of the training workers and of the data tasks.

    The sum may exceed the CPUs of the machine. Otherwise the training workers would take every CPU
    of a small machine, and the data tasks that feed them would wait forever.
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
            "to a running cluster, or unset both to start Ray on this machine."
        ) from error
    try:
        # Ray replaces the signal handlers. Only the main thread can set them.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)
        _wait_for_resources(cluster, root, local=address == "local")
        yield
    finally:
        ray.shutdown()


def _start(arguments: dict[str, Any]) -> None:
    """Starts Ray and tries once more after a time-out.

    Ray allows its processes 30 s to start and has no setting for it. A busy machine needs longer.
    """
    import ray

    try:
        ray.init(**arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        logger.warning("Ray did not start within 30 s; trying once more")
        ray.shutdown()
        ray.init(**arguments)


def _init_arguments(cluster: ClusterConfig, address: str) -> dict[str, Any]:
    if address != "local":
        return {"address": address, "log_to_driver": True}
    folder = ray_temp_folder()
    return {
        "address": "local",
        **({"_temp_dir": folder} if folder else {}),
        "num_cpus": local_cpus(cluster, usable_cpus()),
        "object_store_memory": cluster.object_store_mb * 10**6,
        "include_dashboard": False,
        "log_to_driver": True,
    }


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside the block. Those that are already set keep their value."""
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _ray_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Returns the variables that Ray reads at import and start."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(cluster.collective_timeout_s),
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # Seconds until a command whose cluster has lost its head ends with a message.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
    }
    if cluster_address(cluster) == "local":
        wanted |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file()),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            # Despite its name it works on Linux: 0 keeps Ray on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    return wanted


def _wait_for_resources(
    cluster: ClusterConfig, root: str, *, local: bool, now: Callable[[], float] = time.monotonic
) -> None:
    """Checks the resources. An autoscaling cluster is asked for nodes and has time to add them."""
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
