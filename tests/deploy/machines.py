"""What EKS lets pods have of an EC2 instance, and the version a package is locked to; no test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from tests.root import ROOT


class Machine(NamedTuple):
    """An EC2 instance type. The network interfaces bound how many pods it may run.

    From https://github.com/awslabs/amazon-eks-ami, nodeadm/internal/kubelet/instance-info.jsonl,
    and https://karpenter.sh/docs/reference/instance-types/.
    """

    cpus: int
    memory_mib: int
    interfaces: int
    addresses_per_interface: int


MACHINES = {
    "m7i.xlarge": Machine(4, 16384, 4, 15),
    "g6.4xlarge": Machine(16, 65536, 8, 30),
    "c7i.4xlarge": Machine(16, 32768, 8, 30),
}
# The share of the memory that the machine needs before Kubernetes sees it: Karpenter's default,
# https://karpenter.sh/docs/reference/settings/ (VM_MEMORY_OVERHEAD_PERCENT).
VM_OVERHEAD = 0.075
# kubelet's evictionHard on EKS, in MiB.
EVICTION_MIB = 100


def allocatable_millicores(machine: Machine) -> int:
    """EKS keeps 6 % of the first CPU, 1 % of the second, 0.5 % of two more, 0.25 % of the rest.

    https://github.com/awslabs/amazon-eks-ami, nodeadm/internal/kubelet/config.go.
    """
    total, kept = 1000 * machine.cpus, 0.0
    for start, end, share in (
        (0, 1000, 0.06),
        (1000, 2000, 0.01),
        (2000, 4000, 0.005),
        (4000, total, 0.0025),
    ):
        kept += max(0, min(total, end) - start) * share
    return total - round(kept)


def allocatable_mib(machine: Machine) -> int:
    """EKS keeps 11 MiB for each pod the machine may run, and 255 MiB. Same source."""
    pods = machine.interfaces * (machine.addresses_per_interface - 1) + 2
    seen = machine.memory_mib * (1 - VM_OVERHEAD)
    return int(seen - (11 * pods + 255) - EVICTION_MIB)


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.search(rf"^{package}==([^\s;]+)", lines, re.MULTILINE)
    assert found is not None, package
    return found[1]


def names(requirements: Path) -> dict[str, str]:
    """The packages of a requirements file that this platform installs, with their versions."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    read = [Requirement(line) for line in lines if line]
    here = [one for one in read if one.marker is None or one.marker.evaluate()]
    return {one.name: str(one.specifier).removeprefix("==") for one in here}
