"""What this machine gives a process: CPUs, a home folder, a short and private temporary folder.

Containers, schedulers and system users differ from a developer's machine in exactly these.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
AVX512 = ("avx512bw", "avx512vl", "avx512dq")

MAX_FOLDER = 36
"""Characters. Ray appends up to 70, and the path of a Unix socket has at most 107."""
MIN_SESSION_BYTES = 200 * 2**20
"""Room for the logs and sockets of a Ray on this machine."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class MachineError(ValueError):
    """Raised if this machine has no place for what Ray needs. The message says what to do."""

    exit_code = 2


def usable_cpus() -> int:
    """Returns the CPUs that this process may use, at least 1.

    That is the smaller of its CPU affinity and the quotas of its cgroups. `docker run --cpus 2`
    sets a quota and leaves the affinity at all CPUs of the machine.
    """
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(CGROUPS, OWN_CGROUPS))]))


def threads_each(processes: int) -> int:
    """Returns the threads for each of so many processes side by side, at least 1.

    They share the CPUs of this process. Each takes no more than OMP_NUM_THREADS says, as every
    program of OpenMP: two commands that a user starts side by side would else wait for each other.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    most = int(wanted) if wanted.isascii() and wanted.isdigit() and int(wanted) else usable_cpus()
    return max(1, min(most, usable_cpus() // processes))


def has_bf16() -> bool:
    """Returns whether this CPU computes bfloat16 by oneDNN, as PyTorch asks it; True if unknown.

    oneDNN needs AVX-512 on x86 and bf16 on Arm. Without it PyTorch takes kernels that are tens of
    times slower than those for float32. Loads no torch.
    """
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, found = line.partition(":")
            if name.strip() == "flags":
                return set(AVX512) <= set(found.split())
            if name.strip() == "Features":
                return "bf16" in found.split()
    return True


def _quotas(mounted: Path, own: Path) -> Iterator[float]:
    """Yields the CPUs that each cgroup of this process allows, its ancestors' included.

    A line of `own` is `0::PATH` (version 2), or such as `4:cpu,cpuacct:PATH` (version 1).
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = mounted / "cpu" if controllers else mounted
            folder = top / path.lstrip("/")
            for each in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        quota = (each / "cpu.cfs_quota_us").read_text()
                        period = (each / "cpu.cfs_period_us").read_text()
                    else:
                        quota, period = (each / "cpu.max").read_text().split()
                    if float(quota) > 0:  # version 2 writes `max` for no quota, version 1 -1
                        yield float(quota) / float(period)


def ensure_home() -> None:
    """Gives libraries a private temporary folder where this user's home folder cannot serve.

    A container may run under a user id without an entry in /etc/passwd and without HOME. MLflow and
    torch ask for the home folder when they are imported, and end with an error if there is none.
    One that cannot be written is enough for them; matplotlib would complain about it.
    """
    try:
        if os.access(Path.home(), os.W_OK):
            return
        variable = "MPLCONFIGDIR"
    except RuntimeError:
        variable = "HOME"
    try:
        folder = str(private_folder())
    except MachineError:  # a command that needs Ray says so itself
        folder = tempfile.gettempdir()
    os.environ.setdefault(variable, folder)


@functools.cache
def private_folder() -> Path:
    """Returns a folder of this process that no other user can read. It is removed at exit.

    Its path is short enough for Ray's sockets. Raises MachineError if there is no place for it.
    """
    places = dict.fromkeys((tempfile.gettempdir(), *SHORT_FOLDERS))
    for place in filter(_fits_ray, places):
        folder = Path(tempfile.mkdtemp(prefix="mantis-", dir=place))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    raise MachineError(
        f"Ray needs a folder with a path of at most {MAX_FOLDER} characters and "
        f"{MIN_SESSION_BYTES / 2**20:.0f} MiB of room, and none of {', '.join(places)} is one that "
        "can be written: set TMPDIR to such a folder"
    )


def ray_temp_folder() -> str | None:
    """Returns the folder for the session of a local Ray. None: the one that Ray takes by itself.

    Ray's own is `ray` below RAY_TMPDIR, TMPDIR or /tmp. Where that path is too long for a socket,
    or that disk too small, the session lies in `private_folder` and is removed with it.
    """
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return None if _fits_ray(usual) else str(private_folder() / "ray")


@functools.cache
def token_file() -> Path:
    """Returns a file with a new token for the local Rays of this process, made at the first call.

    Ray's default is a file below the home folder, which may not exist or not be writable. Ray reads
    the token once in a process, so a process has one.
    """
    file = private_folder() / "auth_token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


def _fits_ray(folder: str) -> bool:
    """Returns whether a folder is short, writable and on a disk with room for a session."""
    if len(folder) > MAX_FOLDER:
        return False
    try:
        writable = os.access(folder, os.W_OK | os.X_OK)
        return writable and shutil.disk_usage(folder).free >= MIN_SESSION_BYTES
    except OSError:
        return False
