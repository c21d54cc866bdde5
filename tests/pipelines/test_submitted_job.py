"""A job on a cluster with an MLflow server: submitted, stopped in mid-stage, submitted again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.cluster.local_cluster import LocalCluster, local_cluster
from pipelines.commands.local_cluster import start_mlflow
from pipelines.storage import Store
from tests.faults.harness import kill, titled
from tests.faults.matrix import TITLES
from tests.pipelines.experiment import last_json, mantis, paint, write_config
from tests.pipelines.processes import family, listening
from tests.root import ROOT
from tests.s3 import s3_environment, s3_server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

TIMEOUT_S = 600


@dataclass
class Site:
    """A cluster, its MLflow server, and an experiment whose results all nodes reach."""

    cluster: LocalCluster
    tracking_uri: str
    folder: Path
    config: Path
    root: str = ""  # of storage; below `folder` if it is empty

    def ray_job(
        self, *arguments: str, token: bool = True, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """`ray job ...` as a user runs it, from the repository's root."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= self.cluster.environment if token else {"RAY_AUTH_MODE": "disabled"}
        command, *rest = arguments
        ray = Path(sys.executable).with_name("ray")
        done = subprocess.run(
            [ray, "job", command, "--address", self.cluster.job_address, *rest],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert code in (None, done.returncode), done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def submit(
        self, name: str, *options: str, token: bool = True, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        run = f"python -m pipelines run --config {self.config} tracking.uri={self.tracking_uri}"
        return self.ray_job(
            *("submit", "--submission-id", name, "--working-dir", ".", *options, "--"),
            *(*run.split(), f"storage.root={self.root or (self.folder / 'runs').as_uri()}"),
            token=token,
            code=code,
        )

    def wait_for(self, name: str, line: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(line, log := self.ray_job("logs", name, code=None).stdout):
            assert time.monotonic() < deadline, log
            time.sleep(1)

    def wait_for_status(self, name: str, status: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while status not in (told := self.ray_job("status", name).stdout.upper()):
            assert time.monotonic() < deadline, told
            time.sleep(1)

    def statuses(self) -> dict[str, str]:
        """MLflow's runs by stage, "" for the pipeline's."""
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("mantis")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        return {
            run.data.tags.get("mantis.stage", ""): run.info.status
            for run in runs
            if "mantis.arm" not in run.data.tags
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    paint(folder / "images", train=130)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["stage2"]["epochs"] = 6
    path.write_text(yaml.safe_dump(config))
    with local_cluster(workers=1, cpus=2) as cluster:
        uri = start_mlflow(cluster, folder / "mlflow", None, None)
        yield Site(cluster, uri, folder, path)


def test_a_job_without_the_token_is_refused(site: Site) -> None:
    done = site.submit("stranger", token=False, code=1)
    assert "401" in done.stderr or "token" in done.stderr.lower()
    assert "stranger" not in site.ray_job("list").stdout


def test_a_stopped_job_leaves_its_runs_killed_and_one_submitted_later_goes_on(site: Site) -> None:
    site.submit("first", "--no-wait")
    site.wait_for("first", r"stage2: epoch 2/6")
    assert listening(family(site.cluster.running)) == {"127.0.0.1"}

    site.ray_job("stop", "first")
    assert "STOPPED" in site.ray_job("status", "first").stdout.upper()
    assert site.statuses() == {
        "": "KILLED",
        "prepare": "FINISHED",
        "stage1": "FINISHED",
        "stage2": "KILLED",
    }

    again = site.submit("first", code=1)
    assert "already exists" in again.stdout + again.stderr

    log = site.submit("second").stdout
    assert "stage1: skipped" in log
    assert "stage2: resuming" in log
    assert "stage2: epoch 1/6" not in log
    assert set(site.statuses().values()) == {"FINISHED"}


def test_a_registered_model_is_found_from_outside_the_cluster(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.tracking_uri)
    (model,) = last_json(mantis("models", "--json", folder=site.folder))["models"]
    assert model["model"] == "models:/mantis/1"
    client = MlflowClient(site.tracking_uri)
    experiment = client.get_experiment_by_name("mantis")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:")


def test_a_failed_job_is_read_in_its_bucket_after_the_cluster_is_gone(tmp_path: Path) -> None:
    paint(tmp_path / "images", train=130)
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["stage1"]["epochs"] = 200
    config["cluster"]["max_failures"] = 0
    path.write_text(yaml.safe_dump(config))
    with s3_server() as server, s3_environment(server):
        with local_cluster(workers=1, cpus=2) as cluster:
            uri = start_mlflow(cluster, tmp_path / "mlflow", None, None)
            site = Site(cluster, uri, tmp_path, path, "s3://bucket/runs")
            site.submit("doomed", "--no-wait")
            site.wait_for("doomed", r"stage1: epoch 3/200")
            pids = [process.pid for process in cluster.running]
            kill(lambda: next(titled(pids, TITLES["train worker"]), None), TITLES["train worker"])
            site.wait_for("doomed", r"To resume, submit")
            printed = site.ray_job("logs", "doomed", code=None).stdout
            log = re.search(r"Details are in (s3://bucket/runs/logs/\S+\.log)", printed)
            assert log is not None, printed
            assert "Traceback (most recent call last)" in printed
            site.wait_for_status("doomed", "FAILED")
        text = Store("s3://bucket/runs").read_bytes(f"logs/{log[1].rpartition('/')[2]}").decode()
    assert "stage1: epoch 3/200" in text
    assert "Traceback (most recent call last)" in text
    assert "WorkersLost" in text
