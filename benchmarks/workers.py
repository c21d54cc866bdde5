"""Does the number of workers change what is learned? One config at several worker counts and seeds.

    python -m benchmarks.workers --config configs/quickstart.yaml --workers 1,2,4 --seeds 0,1,2 \
        [key=value ...]

Each run is `mantis evaluate` of the main arm alone, under a storage root of its own for each worker
count, as the count enters no stage key. Begun again, it goes on: finished stages are skipped. For
every epoch of every training, the hash of the rows it consumed is compared between worker counts;
final top1 is that of the evaluation split, end to end. Differences are paired by seed, against the
first worker count. The last line is one JSON object; the exit code is 1 if hashes differ.
"""

from __future__ import annotations

import argparse
import json
import os
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
    """What one run gave: top1 and, for each training, the hash of each epoch's rows."""

    workers: int
    seed: int
    top1: float
    sha256: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Paired:
    """Top1 less that of the first worker count at the same seed. One seed has no error."""

    differences: tuple[float, ...]
    mean: float
    standard_error: float | None

    @property
    def within(self) -> bool | None:
        """Whether the mean is at most two standard errors from 0."""
        error = self.standard_error
        return None if error is None else abs(self.mean) <= 2 * error


def run(config: str, root: str, workers: int, seed: int, overrides: Sequence[str]) -> Run:
    """Trains and evaluates in a process of its own. CalledProcessError if that fails."""
    own = (
        f"seed={seed}",
        f"cluster.workers={workers}",
        f"cluster.cpus_per_worker={min(1.0, len(os.sched_getaffinity(0)) / workers)}",
        f"storage.root={root}/workers-{workers}",
    )
    command = [sys.executable, "-m", "pipelines", "evaluate", "--config", config, "--json"]
    done = subprocess.run(
        [*command, *MAIN_ARM_ALONE, *overrides, *own], stdout=subprocess.PIPE, text=True, check=True
    )
    return read_run(json.loads(done.stdout.splitlines()[-1]), workers, seed)


def read_run(result: Mapping[str, Any], workers: int, seed: int) -> Run:
    """A run from what `mantis evaluate --json` printed."""
    hashes = {
        name: tuple(stage["rows"]["sha256"])
        for name, stage in result["stages"].items()
        if "sha256" in stage["rows"]
    }
    return Run(workers, seed, result["metrics"]["val/top1"], hashes)


def same_hashes(runs: Sequence[Run]) -> bool:
    """Whether runs of one seed consumed the same rows in each step of every epoch and training."""
    seeds: dict[int, Mapping[str, Sequence[str]]] = {}
    return all(seeds.setdefault(each.seed, each.sha256) == each.sha256 for each in runs)


def paired(runs: Sequence[Run], workers: int, against: int) -> Paired:
    """Differences between two worker counts over the seeds both have."""
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
    """The object of the last line."""
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
    """Top1 by worker count and seed, and the paired differences below it."""
    found = summary(runs)
    seeds = sorted({each.seed for each in runs})
    table = Table("workers", *(f"seed {seed}" for seed in seeds), "less first", "standard error")
    for workers, by_seed in found["top1"].items():
        difference = found["paired"].get(workers)
        cells = [f"{by_seed[str(seed)]:.4f}" for seed in seeds]
        if difference is not None:
            error = difference["standard_error"]
            cells += [f"{difference['mean']:+.4f}", "" if error is None else f"{error:.4f}"]
        table.add_row(workers, *cells)
    console.print(table)
    console.print(f"rows of every step: {'the same' if found['same_hash'] else 'NOT the same'}")


@one_message
def main() -> int:
    """Runs all seeds, one after another, each with every worker count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--workers", type=listed(count), metavar="N,N", default=(1, 2, 4))
    parser.add_argument("--seeds", type=listed(int), metavar="S,S", default=(0, 1, 2))
    parser.add_argument("--root", default="runs/workers", help="storage roots are made below it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
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
