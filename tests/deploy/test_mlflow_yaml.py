"""deploy/mlflow.yaml: the server's arguments in the installed MLflow; calls no Kubernetes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml
from mlflow.cli import cli
from mlflow.server.security_utils import is_allowed_host_header

from tests.deploy.machines import locked
from tests.root import ROOT

SERVICE, DEPLOYMENT = yaml.safe_load_all(
    (ROOT / "deploy" / "mlflow.yaml").read_text(encoding="utf-8")
)
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
SERVER: dict[str, Any] = POD["containers"][0]
JOB = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8"))
START_TIMEOUT_S = 150
STRANGERS = ["mlflow.other.svc:5000", "example.org", "10.1.2.3:5000"]


def used_by_the_job() -> str:
    """The host of `tracking.uri` in deploy/rayjob.yaml, with its port."""
    words = JOB["spec"]["entrypoint"].split()
    (uri,) = (word.partition("=")[2] for word in words if word.startswith("tracking.uri="))
    return urlsplit(uri).netloc


def options() -> dict[str, Any]:
    """The server's arguments as MLflow's own command line reads them; unknown ones raise."""
    command = cli.commands["server"]
    return dict(command.make_context("server", list(SERVER["args"])).params)


def test_the_service_leads_to_the_server() -> None:
    assert SERVICE["metadata"]["name"] == used_by_the_job().partition(".")[0]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    (given,) = SERVICE["spec"]["ports"]
    (listening,) = SERVER["ports"]
    assert given["targetPort"] == listening["name"]
    assert listening["containerPort"] == options()["port"]
    assert used_by_the_job().endswith(f":{given['port']}")


def test_one_server_at_a_time_has_the_database() -> None:
    assert DEPLOYMENT["spec"]["replicas"] == 1
    assert DEPLOYMENT["spec"]["strategy"] == {"type": "Recreate"}


def test_the_image_has_the_locked_version_and_the_drivers() -> None:
    assert SERVER["image"] == f"ghcr.io/mlflow/mlflow:v{locked('mlflow')}-full"


def test_mlflow_knows_the_arguments() -> None:
    read = options()
    assert SERVER["command"] == ["mlflow", "server"]
    assert read["host"] == "0.0.0.0"
    assert read["artifacts_destination"].startswith("s3://")
    assert read["serve_artifacts"] is True


def test_the_password_of_the_database_is_in_a_secret() -> None:
    (uri,) = (e for e in SERVER["env"] if e["name"] == "MLFLOW_BACKEND_STORE_URI")
    assert set(uri) == {"name", "valueFrom"}
    assert "secretKeyRef" in uri["valueFrom"]
    assert not any("backend-store-uri" in argument for argument in SERVER["args"])


def test_the_variables_kubernetes_makes_of_the_service_do_not_reach_mlflow() -> None:
    """A service `mlflow` makes MLFLOW_PORT=tcp://..., which `mlflow server` reads as --port."""
    assert POD["enableServiceLinks"] is False


def test_the_server_has_the_storage_of_the_job_and_is_not_root() -> None:
    head = JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert POD["serviceAccountName"] == head["serviceAccountName"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] > 0


def test_the_probes_ask_where_every_host_is_answered() -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"] == {"path": "/health", "port": SERVER["ports"][0]["name"]}


def test_the_names_of_the_service_are_allowed_and_no_others() -> None:
    allowed = options()["allowed_hosts"].split(",")
    for host in ("mlflow:5000", used_by_the_job(), "localhost:8080"):
        assert is_allowed_host_header(allowed, host), host
    for host in STRANGERS:
        assert not is_allowed_host_header(allowed, host), host


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The server, started with the very arguments; store, artifacts and address are local."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--artifacts-destination": (tmp_path / "artifacts").as_uri(),
    }
    given = dict(argument.split("=", 1) for argument in SERVER["args"])
    plain = {each["name"]: each["value"] for each in SERVER["env"] if "value" in each}
    environment = (
        os.environ
        | plain
        | {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
        }
    )
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *SERVER["command"]]
            + [f"{name}={value}" for name, value in (given | local).items()],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while status(f"{address}/health", "localhost:1") != 200:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield address
    finally:
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()
        server.wait(20)


def status(url: str, host: str) -> int:
    """The status of a GET with this Host header; 0 where nobody listens yet."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Host": host}), timeout=30
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_a_server_answers_the_job_and_refuses_other_hosts(address: str) -> None:
    experiment = f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert status(experiment, used_by_the_job()) == 200
    assert status(experiment, "localhost:8080") == 200
    assert {host: status(experiment, host) for host in STRANGERS} == dict.fromkeys(STRANGERS, 403)
    assert status(f"{address}/health", "10.1.2.3:5000") == 200
