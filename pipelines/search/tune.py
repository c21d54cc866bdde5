"""Connects a search to Ray Tune, which starts as many trials as fit and restarts lost ones.

The journal is the record of a search; Tune's own files are never read. Import this module only
while Ray is connected, because Ray reads environment variables at import.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.search import Searcher

from pipelines.cluster.connect import environment
from pipelines.cluster.nodes import (
    check_nodes,
    cluster_nodes,
    on_this_node,
    together,
    wait_for_nodes,
)
from pipelines.cluster.preflight import Available, PreflightError, check_resources
from pipelines.search.driver import SearchDriver
from pipelines.search.points import Halving
from pipelines.search.referee import Referee
from pipelines.search.trial import OUTCOME, TrialOutcome, run_trial
from pipelines.settings.sections import ClusterConfig, Settings

# Reserved by a trial's own process. Tune refuses a request for nothing. A fraction of a CPU could
# leave a small machine without the whole CPU that Ray Data's metadata tasks need.
TRIAL_RESOURCES = {"memory": 2**20}
POLL_S = 0.5
LEAST = 1e-9  # keeps floor() exact when fractions of a CPU or GPU are counted

# Read by Tune at start. Variables that the user has set are kept.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


def concurrent_trials(cluster: ClusterConfig, nodes: Sequence[Available]) -> int:
    """Returns how many trials can train at once without waiting for resources; at least 1.

    Workers are counted per node, because a worker cannot span two. Each trial also needs
    `cluster.data_cpus` CPUs for its data tasks.
    """
    workers = sum(_workers_on(node, cluster) for node in nodes)
    wanted = cluster.max_workers * cluster.cpus_per_worker + (cluster.data_cpus or 1.0)
    by_cpus = math.floor(together(nodes).cpus / wanted + LEAST)
    return max(1, min(workers // cluster.max_workers, by_cpus))


def nodes_for_trials(
    settings: Settings, note: Callable[[str], None]
) -> tuple[list[Available], int]:
    """Returns the nodes of the cluster and how many trials train on them at the same time.

    An autoscaling cluster is asked for the nodes of `tune.concurrent` trials. If it cannot have
    all of them in time, `note` receives how many trials the search goes on with. Ray must be
    connected.
    """
    cluster, most = settings.cluster, settings.tune.concurrent
    if cluster.autoscaling and most is not None:
        with contextlib.suppress(PreflightError):
            workers = most * cluster.max_workers
            wait_for_nodes(cluster, settings.storage.root, workers, note)
        check_nodes(cluster, settings.storage.root)
    nodes = cluster_nodes()
    fit = concurrent_trials(cluster, nodes)
    if most is not None and fit < most:
        note(f"tune.concurrent is {most}, and the cluster has room for {fit}: {fit} at a time")
    return nodes, min(fit, most or fit)


def run_trials(driver: SearchDriver, halving: Halving | None, *, concurrent: int) -> float:
    """Runs trials until the driver has no more. Returns the wall time in seconds.

    Ray must be connected.
    """
    settings, journal = driver.task.settings, driver.journal
    began, folder = time.time(), f"{journal.folder}/tune"
    with environment(TUNE_ENVIRONMENT), _referee(driver, halving) as (name, referee):
        link = _Link(driver, name, referee)
        journal.store.delete(folder)
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, task=driver.task, concurrent=concurrent),
                TRIAL_RESOURCES,
            ),
            tune_config=tune.TuneConfig(
                search_alg=_Source(link),
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=journal.store.join(folder),
                callbacks=[_Watch(link)],
                failure_config=tune.FailureConfig(max_failures=settings.tune.max_failures),
                verbose=0,
            ),
        ).fit()
        journal.store.delete(folder)
    return time.time() - began


def check_fits(nodes: Sequence[Available], settings: Settings) -> None:
    """Raises PreflightError if the whole cluster is too small for the training of a trial."""
    check_resources(settings.cluster, settings.storage.root, together(nodes), data_cpus=0)


class _Link:
    """Gives Tune's search algorithm and callback access to the driver and the referee."""

    def __init__(self, driver: SearchDriver, name: str, referee: ActorHandle) -> None:
        self.driver, self.name, self.referee = driver, name, referee
        self.numbers: dict[str, int] = {}
        self.fetched = 0.0

    def fetch(self) -> None:
        """Passes new verdicts from the referee to the driver."""
        self.fetched = time.monotonic()
        # Nothing is lost if the referee does not answer: a finished trial reports all epochs.
        with contextlib.suppress(ray.exceptions.RayError):
            for verdict in ray.get(self.referee.drain.remote(), timeout=10):
                self.driver.judged(verdict)

    def __getstate__(self) -> dict[str, Any]:
        """Returns no state: Tune pickles its search algorithm, and this project unpickles none."""
        return {}


class _Source(Searcher):
    """Adapts the driver to Tune's interface of a search algorithm."""

    def __init__(self, link: _Link) -> None:
        super().__init__()
        self.link = link

    def suggest(self, trial_id: str) -> Any:
        trial = self.link.driver.next_trial()
        if trial is None:
            return Searcher.FINISHED
        self.link.numbers[trial_id] = trial["number"]
        return {**trial, "referee": self.link.name}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        self.link.fetch()
        text = (result or {}).get(OUTCOME)
        outcome = None if error or text is None else TrialOutcome.from_json(text)
        self.link.driver.over(self.link.numbers[trial_id], outcome)


class _Watch(tune.Callback):
    """Fetches the referee's verdicts between two steps of Tune, at most every POLL_S seconds."""

    def __init__(self, link: _Link) -> None:
        self.link = link

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.link.fetched >= POLL_S:
            self.link.fetch()


def _workers_on(node: Available, cluster: ClusterConfig) -> int:
    """Returns how many training workers fit on a node. A fraction of a GPU never spans two GPUs."""
    counts = []
    if cluster.cpus_per_worker:
        counts.append(math.floor(node.cpus / cluster.cpus_per_worker + LEAST))
    if 0 < cluster.gpus_per_worker < 1:
        counts.append(int(node.gpus) * math.floor(1 / cluster.gpus_per_worker + LEAST))
    elif cluster.gpus_per_worker:
        counts.append(math.floor(node.gpus / cluster.gpus_per_worker + LEAST))
    return min(counts, default=cluster.max_workers)


@contextlib.contextmanager
def _referee(driver: SearchDriver, halving: Halving | None) -> Iterator[tuple[str, ActorHandle]]:
    """Starts the referee with the epochs in the journal. Yields its name and its handle."""
    name = f"mantis-referee-{uuid.uuid4().hex[:12]}"
    referee = (
        ray.remote(num_cpus=0)(Referee)
        .options(name=name, max_restarts=0, scheduling_strategy=on_this_node())
        .remote(halving, driver.objective)
    )
    ray.get(referee.recall.remote(list(driver.journal.trials.values())))
    try:
        yield name, referee
    finally:
        ray.kill(referee)
