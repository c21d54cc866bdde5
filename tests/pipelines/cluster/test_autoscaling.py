"""What stands in Ray's own store of requested resources while a command waits, and after it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cluster.local_cluster import LocalCluster, local_cluster
from tests.pipelines.experiment import mantis, paint, write_config
from tests.root import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOOK = """
import json, sys, time
import ray
from tests.ray_private import AUTOSCALER_RESOURCE_REQUEST_CHANNEL, _internal_kv_get
ray.init(address=sys.argv[1], log_to_driver=False)
while True:
    found = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    print(len(json.loads(found)) if found else 0, flush=True)
    time.sleep(0.2)
"""


@dataclass
class Watch:
    """The numbers of requested bundles in Ray's store, as a process of its own reads them."""

    cluster: LocalCluster
    seen: list[int]
    news: threading.Condition

    def next(self) -> int:
        """Returns the number that the store holds from now on."""
        with self.news:
            after = len(self.seen) + 2  # the next may have been read before
            assert self.news.wait_for(lambda: len(self.seen) >= after, 60)
            return self.seen[-1]

    def most_since(self, start: int) -> int:
        return max(self.seen[start:])


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    with local_cluster(workers=1, cpus=2) as cluster:
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        process = subprocess.Popen(
            [sys.executable, "-c", LOOK, cluster.address],
            env={**own, **cluster.environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Watch(cluster, [], threading.Condition())

        def listen() -> None:
            assert process.stdout is not None
            with process.stdout as stdout:
                for line in stdout:
                    with found.news:
                        found.seen.append(int(line))
                        found.news.notify_all()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            assert found.next() == 0
            yield found
        finally:
            process.kill()
            process.wait()
            listener.join()


def command(watch: Watch, folder: Path, *overrides: str, code: int = 0) -> tuple[str, int]:
    """Runs the chain on the cluster. Returns its output and the most bundles seen meanwhile."""
    start = len(watch.seen)
    paint(folder / "images", train=60)
    done = mantis(
        *("run", "--config", str(write_config(folder)), "cluster.autoscaling=true"),
        *(f"storage.root=file://{folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db"),
        *overrides,
        folder=folder,
        environment={**watch.cluster.environment, "RAY_ADDRESS": watch.cluster.address},
        code=code,
    )
    return done.stdout + done.stderr, watch.most_since(start)


def test_a_request_that_cannot_be_met_stands_while_the_command_waits_and_is_taken_back(
    watch: Watch, tmp_path: Path
) -> None:
    wanted = ("cluster.workers=50", "cluster.start_timeout_s=6", "stage1.batch_size=50")
    text, most = command(watch, tmp_path, *wanted, "stage2.batch_size=50", code=2)
    assert "asks for" in text
    assert "prepare: ran" in text  # with the nodes of one worker
    assert most == 51
    assert watch.next() == 0


def test_nothing_stays_requested_after_data_and_train_have_run(
    watch: Watch, tmp_path: Path
) -> None:
    text, most = command(watch, tmp_path)
    assert "stage2" in text
    assert most >= 1
    assert watch.next() == 0
