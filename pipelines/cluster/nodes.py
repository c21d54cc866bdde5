"""The nodes of a Ray cluster: what they have, what they can do, and more of them on demand.

Ray must be connected. An autoscaling cluster keeps one list of requested resources. Ray Data and
Ray Train replace that list about every 20 s, so it is written again while a command waits, and
emptied when the command ends: a request that nobody takes back keeps nodes running for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.cluster.preflight import (
    Available,
    PreflightError,
    check_resources,
    check_room_for_data,
)
from pipelines.settings.sections import ClusterConfig
from pipelines.storage import StorageError, Store, is_shared

logger = logging.getLogger(__name__)
POLL_INTERVAL_S = 1.0
NOTE_INTERVAL_S = 60.0
CHECK_TIMEOUT_S = 120.0
"""Seconds in which a node answers the check. One whose GPUs are all in use does not answer."""
SOME_GPU = 0.001  # of one GPU: Ray then shows a task that GPU, beside what else runs on it


def cluster_nodes() -> list[Available]:
    """Returns the resources of each live node."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Available(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def together(nodes: Sequence[Available]) -> Available:
    """Returns the summed resources of the nodes."""
    return Available(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), len(nodes))


def on_this_node() -> Any:
    """Returns the scheduling strategy that pins an actor to the node of this process.

    An actor that serves this process must not depend on another node, where Ray could place it by
    default.
    """
    import ray

    return _pinned_to(ray.get_runtime_context().get_node_id())


def bundles(cluster: ClusterConfig, workers: int) -> list[dict[str, int]]:
    """Returns the resources to request: those of so many training workers, and the data tasks'."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    whole = {name: math.ceil(amount) for name, amount in worker.items() if amount}
    return [whole] * (workers if whole else 0) + [{"CPU": math.ceil(cluster.data_cpus or 1.0)}]


def wait_for_nodes(
    cluster: ClusterConfig,
    root: str,
    workers: int,
    note: Callable[[str], None],
    *,
    local: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Returns once `workers` training workers and the data tasks fit. `root` is `storage.root`.

    An autoscaling cluster is asked for nodes and has `cluster.start_timeout_s` to add them. Raises
    PreflightError if too few nodes are there by then, or at once if the cluster does not scale.
    """
    from data_prep.ray_data import data_nodes

    data_cpus = 0.0 if local else cluster.data_cpus or 1.0
    began = told = now()
    while True:
        if cluster.autoscaling:
            _request(bundles(cluster, workers))
        try:
            nodes = cluster_nodes()
            there = together(nodes)
            check_resources(cluster, root, there, data_cpus=data_cpus, workers=workers)
            if workers and not data_nodes():
                check_room_for_data(cluster, nodes, data_cpus=data_cpus)
            return
        except PreflightError:
            if not cluster.autoscaling or now() - began > cluster.start_timeout_s:
                raise
        if now() - told >= NOTE_INTERVAL_S:
            told = now()
            note(waiting_text(cluster, workers, there, now() - began))
        time.sleep(POLL_INTERVAL_S)


def waiting_text(cluster: ClusterConfig, workers: int, there: Available, waited_s: float) -> str:
    """Returns the note about nodes that have not joined yet."""
    cpus, gpus = workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker
    wanted = f"{cpus + (cluster.data_cpus or 1):g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    return (
        f"waiting for nodes, {waited_s / 60:.0f} of at most {cluster.start_timeout_s / 60:.0f} "
        f"minutes: {wanted} are requested, and the {there.nodes} nodes have {there.cpus:g} CPUs "
        f"and {there.gpus:g} GPUs"
    )


@contextlib.contextmanager
def requests_taken_back(cluster: ClusterConfig) -> Iterator[None]:
    """Empties the list of requested resources at the end of the block, whatever ends it."""
    try:
        yield
    finally:
        if cluster.autoscaling:
            # A cluster whose head is lost has no list any more.
            with contextlib.suppress(Exception):
                _request([])


def check_nodes(cluster: ClusterConfig, root: str) -> None:
    """Tries on every live node what the work will need there: the storage, and torch on its GPU.

    Raises PreflightError with the first node that cannot do it. A node that does not answer within
    CHECK_TIMEOUT_S is taken to be at work for another job, and is left out.
    """
    import ray

    shared = root if is_shared(root) else None
    check = ray.remote(num_cpus=0, max_retries=0)(node_fault)
    asked = {}
    for node in filter(_is_worker, ray.nodes()):
        gpus = bool(cluster.gpus_per_worker) and node["Resources"].get("GPU", 0.0) > 0
        options = {
            "num_gpus": SOME_GPU if gpus else 0,
            "scheduling_strategy": _pinned_to(node["NodeID"]),
        }
        asked[check.options(**options).remote(shared, gpus)] = node["NodeManagerAddress"]
    answered, silent = (
        ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_TIMEOUT_S)
        if asked
        else ([], [])
    )
    for each in silent:
        logger.warning("node %s did not answer the check of nodes in time", asked[each])
        ray.cancel(each)
    for each in answered:
        try:
            fault = ray.get(each)
        except ray.exceptions.RayError as error:  # the node left, or its worker was lost
            logger.warning("node %s did not finish the check of nodes: %s", asked[each], error)
            continue
        if fault:
            raise PreflightError(f"node {asked[each]}: {fault}")


def node_fault(root: str | None, gpu: bool) -> str | None:
    """Returns what is wrong with the node of this process, and what to do; None if nothing is.

    Tries to write below `root`, and to compute on a GPU. Runs as a Ray task.
    """
    if root is not None:
        try:
            Store(root).check_writable()
        except StorageError as error:
            return (
                f"{error}. Every node writes there: give the nodes access to it, on AWS by an "
                "instance profile (docs/guide/cluster.md)"
            )
    return gpu_fault() if gpu else None


def gpu_fault() -> str | None:
    """Returns why torch cannot compute on the GPU of this process, and what to do, or None."""
    import torch

    try:
        torch.ones(2, device="cuda").sum().item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        reason = str(error).strip().splitlines()[0].rstrip(".")
        return (
            f"it has a GPU that torch {torch.__version__} ({built}) cannot use: {reason}. "
            f"{driver_text()}: start nodes from an image with a driver that is new enough for it "
            "(docs/guide/cluster.md), or set cluster.gpus_per_worker=0"
        )
    return None


def driver_text(file: str = "/proc/driver/nvidia/version") -> str:
    """Returns a sentence with the version of the NVIDIA driver as its kernel module gives it."""
    try:
        with open(file, encoding="utf-8") as lines:
            words = lines.readline().split()
    except OSError:
        return "No NVIDIA driver is loaded there"
    version = next((each for each in words if each.replace(".", "").isdigit()), "unknown")
    return f"The version of its NVIDIA driver is {version}"


def _is_worker(node: Mapping[str, Any]) -> bool:
    """Returns whether tasks may run on the node. A head without CPUs and GPUs does no work."""
    has = node["Resources"]
    return bool(node["Alive"]) and has.get("CPU", 0.0) + has.get("GPU", 0.0) > 0


def _pinned_to(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _request(wanted: list[dict[str, int]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=wanted)
