"""What a machine gives a process: CPUs by quota, a home, a short private folder for Ray."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.cluster import connect, machine
from pipelines.cluster.machine import (
    MAX_FOLDER,
    MachineError,
    ensure_home,
    private_folder,
    ray_temp_folder,
    token_file,
    usable_cpus,
)
from pipelines.settings.sections import ClusterConfig

USAGE = namedtuple("USAGE", "free")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No private folder has been made yet, and none is left over."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    for made in (private_folder, token_file):
        made.cache_clear()
    yield
    for made in (private_folder, token_file):
        made.cache_clear()


def temporary_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Both Python and Ray see this TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(machine.tempfile, "tempdir", str(folder))


def cgroups(tmp_path: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of control groups and the file that names this process's own."""
    mounted, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text(lines)
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    return mounted, own


@pytest.mark.parametrize(
    ("lines", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # docker run --cpus 2
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 96),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/not/mounted\n", {"cpu.max": "400000 100000\n"}, 4),  # the host's path in a container
        (
            "5:memory:/\n4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "700000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            7,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            96,
        ),
        ("0::/\n", {}, 96),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 96),  # more than the affinity
    ],
)
def test_cpus_are_the_least_of_affinity_and_quotas(
    lines: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted, own = cgroups(tmp_path, lines, files)
    monkeypatch.setattr(machine, "CGROUPS", mounted)
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert usable_cpus() == cpus
    folder = connect._init_arguments(ClusterConfig(), "local")
    assert folder["num_cpus"] == max(2, cpus)


@pytest.mark.parametrize(
    ("wanted", "processes", "threads"),
    [
        (None, 1, 8),
        (None, 3, 2),
        (None, 9, 1),
        ("1", 1, 1),
        ("3", 1, 3),
        ("3", 4, 2),
        ("16", 2, 4),
        ("0", 2, 4),
        ("", 2, 4),
        ("4,2", 2, 4),
    ],
)
def test_processes_share_the_cpus_and_take_no_more_threads_than_openmp_may(
    wanted: str | None, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert machine.threads_each(processes) == threads


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("flags\t\t: fpu avx2 avx512bw avx512vl avx512dq\n", True),
        ("flags\t\t: fpu avx2 avx512bw\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", True),
        (None, True),
    ],
)
def test_bf16_is_what_the_cpu_says(
    text: str | None, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.has_bf16() is has


def test_bf16_is_what_torch_says_of_this_cpu() -> None:
    if machine.CPU_INFO.is_file():
        assert machine.has_bf16() is torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_system_without_affinity_and_control_groups_has_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cpus() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


@pytest.mark.usefixtures("fresh")
def test_a_user_without_a_home_of_use_gets_a_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setenv("HOME", "/nonexistent")
    ensure_home()
    assert os.environ["HOME"] == "/nonexistent"  # MLflow needs it to be known, not to exist
    assert os.environ["MPLCONFIGDIR"] == str(private_folder())
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(machine.Path, "home", none)
    ensure_home()
    assert os.environ["HOME"] == str(private_folder())
    assert private_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("fresh")
def test_the_token_of_a_local_ray_lies_outside_the_home_folder() -> None:
    wanted = connect._ray_environment(ClusterConfig())
    token = Path(wanted["RAY_AUTH_TOKEN_PATH"])
    assert token == token_file() == private_folder() / "auth_token"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    elsewhere = connect._ray_environment(ClusterConfig(address="head:6379"))
    assert "RAY_AUTH_TOKEN_PATH" not in elsewhere


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("length", [60, 82])
def test_ray_gets_a_short_private_folder_where_tmpdir_is_long(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * max(1, length - len(str(tmp_path)) - 1))
    long.mkdir()
    temporary_folder(monkeypatch, long)
    folder = connect._init_arguments(ClusterConfig(), "local")["_temp_dir"]
    assert len(folder) <= MAX_FOLDER
    assert Path(folder).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("fresh")
def test_ray_takes_its_usual_folder_where_that_is_short_and_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: USAGE(10**12))
    assert ray_temp_folder() is None
    assert "_temp_dir" not in connect._init_arguments(ClusterConfig(), "local")
    assert "_temp_dir" not in connect._init_arguments(ClusterConfig(), "head:6379")


@pytest.mark.usefixtures("fresh")
def test_a_small_tmpdir_is_left_to_others_and_a_machine_without_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary_folder(monkeypatch, Path("/small"))
    monkeypatch.setattr(machine.os, "access", lambda *_: True)
    free = {"/small": 50 * 2**20, "/tmp": 10**12}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: USAGE(free.get(folder, 0)))
    assert str(ray_temp_folder()).startswith("/tmp/mantis-")
    private_folder.cache_clear()
    free["/tmp"] = 50 * 2**20
    with pytest.raises(MachineError, match=r"200 MiB of room.*none of /small, /tmp.*set TMPDIR"):
        ray_temp_folder()
