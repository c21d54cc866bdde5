"""Checks that the number of workers does not change the rows trained on, and compares final top1.

    python -m benchmarks.workers --config configs/quickstart.yaml --workers 1,2,4 --seeds 0,1,2 \
        [key=value ...]

Each run is `mantis evaluate` of the main arm. Each worker count has its own storage root, because
the count is not part of a stage key. The same command continues an interrupted comparison; finished
stages are skipped. The hashes of the rows of every epoch are compared between worker counts. Final
top1 is measured end to end on the evaluation split. Differences from the first worker count are
paired by seed. The last line is one JSON object. The exit code is 1 if hashes differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.program import count, listed, one_message
from pipelines.cluster.machine import usable_cpus

MAIN_ARM_ALONE = (
    "evaluate.baselines=[]",
    "evaluate.rate_weights=[]",
    "evaluate.baseline_rate_weights=null",
    "evaluate.seeds=[]",
    "evaluate.codecs={}",
    "evaluate.early_exit={}",
    "tracking.enabled=false",
)


@dataclass(frozen=True)
class Run:
    """The result of one run. `sha256` holds the hash of each epoch's rows for each training."""

    workers: int
    seed: int
    top1: float
    sha256: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Paired:
    """Differences in top1 from the first worker count, paired by seed.

    With one seed there is no standard error.
    """

    differences: tuple[float, ...]
    mean: float
    standard_error: float | None

    @property
    def within(self) -> bool | None:
        """Returns True if the mean is within two standard errors of 0, None if there is none."""
        error = self.standard_error
        return None if error is None else abs(self.mean) <= 2 * error


def run(config: str, root: str, workers: int, seed: int, overrides: Sequence[str]) -> Run:
    """Trains and evaluates in a new process. Raises CalledProcessError if that fails."""
    own = (
        f"seed={seed}",
        f"cluster.workers={workers}",
        f"cluster.cpus_per_worker={min(1.0, usable_cpus() / workers)}",
        f"storage.root={root}/workers-{workers}",
    )
    command = [sys.executable, "-m", "pipelines", "evaluate", "--config", config, "--json"]
    done = subprocess.run(
        [*command, *MAIN_ARM_ALONE, *overrides, *own], stdout=subprocess.PIPE, text=True, check=True
    )
    return read_run(json.loads(done.stdout.splitlines()[-1]), workers, seed)


def read_run(result: Mapping[str, Any], workers: int, seed: int) -> Run:
    """Builds a run from the output of `mantis evaluate --json`."""
    hashes = {
        name: tuple(stage["rows"]["sha256"])
        for name, stage in result["stages"].items()
        if "sha256" in stage["rows"]
    }
    return Run(workers, seed, result["metrics"]["val/top1"], hashes)


def same_hashes(runs: Sequence[Run]) -> bool:
    """Returns True if runs with the same seed trained on the same rows in every step."""
    seeds: dict[int, Mapping[str, Sequence[str]]] = {}
    return all(seeds.setdefault(each.seed, each.sha256) == each.sha256 for each in runs)


def paired(runs: Sequence[Run], workers: int, against: int) -> Paired:
    """Returns the differences between two worker counts over the seeds that both have."""
    top1 = {(each.workers, each.seed): each.top1 for each in runs}
    seeds = sorted({each.seed for each in runs})
    found = tuple(
        top1[workers, seed] - top1[against, seed]
        for seed in seeds
        if (workers, seed) in top1 and (against, seed) in top1
    )
    error = stdev(found) / sqrt(len(found)) if len(found) > 1 else None
    return Paired(found, fmean(found), error)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the JSON object of the last line."""
    counts = list(dict.fromkeys(each.workers for each in runs))
    against = {count: paired(runs, count, counts[0]) for count in counts[1:]}
    return {
        "same_hash": same_hashes(runs),
        "top1": {
            str(count): {str(each.seed): each.top1 for each in runs if each.workers == count}
            for count in counts
        },
        "paired": {
            str(count): {**asdict(found), "within": found.within}
            for count, found in against.items()
        },
    }


def show(runs: Sequence[Run], console: Console) -> None:
    """Prints top1 by worker count and seed, the paired differences, and whether rows agree."""
    found = summary(runs)
    seeds = sorted({each.seed for each in runs})
    table = Table("workers", *(f"seed {seed}" for seed in seeds), "difference", "standard error")
    for workers, by_seed in found["top1"].items():
        difference = found["paired"].get(workers)
        cells = [f"{by_seed[str(seed)]:.4f}" for seed in seeds]
        if difference is not None:
            error = difference["standard_error"]
            cells += [f"{difference['mean']:+.4f}", "" if error is None else f"{error:.4f}"]
        table.add_row(workers, *cells)
    console.print(table)
    console.print(f"rows of every step: {'the same' if found['same_hash'] else 'DIFFERENT'}")


@one_message
def main() -> int:
    """Runs every worker count for each seed, one run after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument(
        "--workers", type=listed(count), metavar="N,N", default=(1, 2, 4), help="worker counts"
    )
    parser.add_argument("--seeds", type=listed(int), metavar="S,S", default=(0, 1, 2), help="seeds")
    parser.add_argument(
        "--root", default="runs/workers", help="folder for the storage root of each worker count"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    runs = [
        run(arguments.config, arguments.root, workers, seed, arguments.overrides)
        for seed in arguments.seeds
        for workers in arguments.workers
    ]
    show(runs, Console(stderr=True))
    found = summary(runs)
    print(json.dumps(found))
    return 0 if found["same_hash"] else 1


if __name__ == "__main__":
    sys.exit(main())
