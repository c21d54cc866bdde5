"""A cluster of several nodes on one machine: what it starts, where it listens, what it ends."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.cluster import local_cluster as module
from pipelines.cluster.local_cluster import (
    LocalCluster,
    LocalClusterError,
    Started,
    local_cluster,
)
from pipelines.cluster.machine import MAX_FOLDER
from pipelines.commands import local_cluster as cli_local_cluster
from pipelines.commands.local_cluster import DEFAULT_FOLDER, free_port, how_to_submit, start_mlflow
from tests.pipelines.processes import alive, family, listening

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
PARENT = [
    *(sys.executable, "-c"),
    f"import subprocess; subprocess.Popen({SLEEP!r}); {SLEEP[-1]}",
]
RESOURCES = """
import os, ray
ray.init(address=os.environ["ADDRESS"], log_to_driver=False)
print(int(ray.cluster_resources()["CPU"]), sum(node["Alive"] for node in ray.nodes()))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder short enough for sockets; pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="mantis-", dir="/tmp", ignore_cleanup_errors=True) as f:
        yield Path(f)


def mantis_cluster(command: str, folder: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["cluster", command, "--folder", str(folder), *options])


def test_a_folder_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(LocalClusterError, match=f"at most {MAX_FOLDER}"):
        LocalCluster(Path("/tmp") / ("x" * MAX_FOLDER))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_the_files_of_another_user_are_not_believed(command: str, folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        began = psutil.Process(bystander.pid).create_time()
        record = [{"name": "head", "pid": bystander.pid, "began": began}]
        (folder / "started.json").write_text(json.dumps(record))
        os.chown(folder, 12345, 12345)
        done = mantis_cluster(command, folder)
        assert done.exit_code == 2
        assert done.stderr == f"error: {folder} belongs to another user: give another --folder\n"
        assert bystander.poll() is None
        assert (folder / "started.json").exists()
        bystander.communicate(b"\n")
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as own:
        link = Path(own) / "link"
        link.symlink_to(own)
        LocalCluster(link)
        os.lchown(link, 12345, 12345)
        with pytest.raises(LocalClusterError, match="belongs to another user"):
            LocalCluster(link)


def test_a_pid_that_was_given_to_another_process_is_not_taken_for_it() -> None:
    began = psutil.Process().create_time()
    assert Started("this", os.getpid(), began).process() is not None
    assert Started("this", os.getpid(), began - 100).process() is None


def test_what_does_not_start_is_told_with_the_end_of_its_log(folder: Path) -> None:
    cluster = LocalCluster(folder)
    command = [sys.executable, "-c", "raise SystemExit('no room at the inn')"]
    with pytest.raises(
        LocalClusterError, match=r"(?s)server ended with code 1.*no room at the inn"
    ):
        cluster.run("server", command, lambda: False)


def test_stopping_ends_children_of_what_was_started_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_TIMEOUT_S", 1.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        cluster = LocalCluster(folder)
        cluster.run("parent", PARENT, lambda: len(family(cluster.running)) > 1)
        processes = family(cluster.running)
        LocalCluster(folder).stop()  # as another process would
        cluster.stop()
        assert alive(processes) == []
        assert not folder.exists()
        assert bystander.poll() is None
        bystander.communicate(b"\n")


def test_a_second_start_says_so_and_starts_nothing(folder: Path) -> None:
    cluster = LocalCluster(folder)
    cluster.run("node", SLEEP, lambda: True)
    second = mantis_cluster("up", folder)
    assert second.exit_code == 2
    assert "already runs" in second.output
    assert f"`mantis cluster down --folder {folder}` ends it" in second.output
    assert [each.name for each in cluster.started] == ["node"]
    assert mantis_cluster("down", folder).output == "ended node\n"
    assert cluster.running == []
    cluster.stop()


def test_a_folder_with_other_files_is_neither_used_nor_removed(folder: Path) -> None:
    (folder / "thesis.tex").touch()
    with pytest.raises(LocalClusterError, match="holds other files"):
        LocalCluster(folder).start()
    LocalCluster(folder).stop()
    assert (folder / "thesis.tex").exists()


def test_when_mlflow_cannot_start_the_nodes_end_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(cluster: LocalCluster, **options: object) -> None:
        cluster.run("head", SLEEP, lambda: True)
        started.extend(family(cluster.running))

    def start_mlflow(cluster: LocalCluster, *options: object) -> str:
        cluster.run("mlflow", [sys.executable, "-c", "raise SystemExit('no store')"], lambda: False)
        return ""

    started: list[psutil.Process] = []
    monkeypatch.setattr(LocalCluster, "start", start)
    monkeypatch.setattr(cli_local_cluster, "start_mlflow", start_mlflow)
    done = mantis_cluster("up", folder, "--root", str(tmp_path))
    assert done.exit_code == 2
    assert "error: mlflow ended with code 1. The end of its log:\nno store" in done.output
    assert started
    assert alive(started) == []


def test_without_a_cluster_there_is_nothing_to_end(folder: Path) -> None:
    done = mantis_cluster("down", folder)
    assert done.output == f"no cluster in {folder}\n"
    done = mantis_cluster("status", folder)
    assert (done.exit_code, done.output) == (1, f"no cluster runs in {folder}\n")
    done = mantis_cluster("status", folder, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"folder": str(folder), "processes": [], "addresses": {}}


def test_status_tells_what_runs_and_where_it_is_reached(folder: Path) -> None:
    cluster = LocalCluster(folder)
    for name in ("head", "mlflow"):
        cluster.run(name, SLEEP, lambda: True)
    (folder / "head.json").write_text(
        json.dumps({"address": "127.0.0.1:6379", "dashboard": "127.0.0.1:8265"})
    )
    cluster.note_mlflow("http://127.0.0.1:5000")
    places = {
        "address": "127.0.0.1:6379",
        "dashboard": "http://127.0.0.1:8265",
        "mlflow": "http://127.0.0.1:5000",
    }
    head, mlflow = cluster.running
    done = mantis_cluster("status", folder)
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"head  pid {head.pid}  runs",
        f"mlflow  pid {mlflow.pid}  runs",
        *(f"{name}: {address}" for name, address in places.items()),
    ]
    assert json.loads(mantis_cluster("status", folder, "--json").stdout)["addresses"] == places
    mlflow.kill()
    mlflow.wait()
    done = mantis_cluster("status", folder)
    assert done.exit_code == 1
    assert f"parts of the cluster in {folder} have ended" in done.stderr
    assert "http://127.0.0.1:5000" not in done.stdout
    done = mantis_cluster("down", folder, "--json")
    assert json.loads(done.stdout) == {"folder": str(folder), "ended": ["head"]}
    cluster.stop()


def test_a_port_in_use_is_not_taken(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        taken = used.getsockname()[1]
        assert free_port(taken) != taken
        with pytest.raises(LocalClusterError, match=f"port {taken} is in use"):
            start_mlflow(LocalCluster(folder), tmp_path, taken, None)


def test_the_lines_to_submit_can_be_pasted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://127.0.0.1:8265"
    monkeypatch.setattr(LocalCluster, "job_address", address)
    text = how_to_submit(LocalCluster(folder), Path("/home/a b/runs"), "http://127.0.0.1:5000")
    command = text.split("ended:\n")[1].split("Stop the job:")[0]
    words = shlex.split(command.replace("\\\n", ""))
    assert words[1:5] == ["job", "submit", "--address", address]
    assert words[words.index("--") + 1 :][:4] == ["python", "-m", "pipelines", "run"]
    assert "storage.root=file:///home/a%20b/runs" in words
    assert text.endswith(f" -m pipelines cluster down --folder {folder}")
    text = how_to_submit(LocalCluster(DEFAULT_FOLDER), Path("/runs"), "http://127.0.0.1:5000")
    assert text.endswith(" -m pipelines cluster down")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(workers=2, cpus=1) as started:
        yield started


@pytest.mark.faults
class TestARunningCluster:
    def test_has_a_head_without_cpus_and_the_nodes_asked_for(self, cluster: LocalCluster) -> None:
        environment = {**os.environ, **cluster.environment, "ADDRESS": cluster.address}
        command = [sys.executable, "-c", RESOURCES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.stdout.split() == ["2", "3"], done.stderr

    def test_listens_on_the_loopback_interface_only(self, cluster: LocalCluster) -> None:
        assert listening(family(cluster.running)) == {"127.0.0.1"}

    def test_refuses_who_has_no_token(self, cluster: LocalCluster) -> None:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{cluster.job_address}/api/jobs/", timeout=10)
        assert isinstance(cluster.request("/api/jobs/"), list)

    def test_ends_with_all_its_processes(self, cluster: LocalCluster) -> None:
        processes = family(cluster.running)
        assert len(processes) > 5
        cluster.stop()
        assert alive(processes) == []
