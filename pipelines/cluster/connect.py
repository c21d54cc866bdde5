"""Starts or joins Ray once per command and checks that it has the resources of the config."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.cluster.machine import ray_temp_folder, token_file, usable_cpus
from pipelines.cluster.nodes import check_nodes, requests_taken_back, wait_for_nodes
from pipelines.cluster.preflight import PreflightError, cluster_address
from pipelines.cluster.ray_private import LOOPBACK_ONLY, LOST_HEAD_S
from pipelines.settings.sections import ClusterConfig

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connect(
    cluster: ClusterConfig,
    root: str,
    *,
    workers: int | None = None,
    note: Callable[[str], None] = logger.info,
) -> Iterator[None]:
    """Connects to Ray inside the block, with the resources of `cluster`. `root` is `storage.root`.

    `workers` training workers must fit, by default `cluster.min_workers`. `note` receives what a
    user should know while nodes are awaited. A Ray started here listens on the loopback interface
    only and ends with the block. If this process is already connected, nothing changes. Raises
    PreflightError if resources are missing or a node of the cluster cannot be used.
    """
    fewest = cluster.min_workers if workers is None else workers
    with environment(_ray_environment(cluster)):
        yield from _connected(cluster, root, fewest, note)


def local_cpus(cluster: ClusterConfig, machine_cpus: int) -> int:
    """Returns the logical CPUs of a local Ray: those of the training workers and of the data tasks.

    The sum may exceed the CPUs of the machine. Otherwise the training workers would take every CPU
    of a small machine, and the data tasks that feed them would wait forever.
    """
    training = cluster.max_workers * cluster.cpus_per_worker
    data = cluster.data_cpus or max(1.0, machine_cpus - training)
    return math.ceil(training + data)


def _connected(
    cluster: ClusterConfig, root: str, workers: int, note: Callable[[str], None]
) -> Iterator[None]:
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
        local = address == "local"
        with requests_taken_back(cluster):
            wait_for_nodes(cluster, root, workers, note, local=local)
            if not local:
                check_nodes(cluster, root)
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
        LOST_HEAD_S: "30",  # then the command ends with a message
    }
    if cluster_address(cluster) == "local":
        wanted |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file()),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            LOOPBACK_ONLY: "0",
            "RAY_TRAIN_METRICS_ENABLED": "0",  # no dashboard would show them
        }
    return wanted
